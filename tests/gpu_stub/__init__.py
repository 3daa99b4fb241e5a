"""Stub GPU: the CUDA path of torch, Lightning, diffusers and sdtune at the shapes of SD 1.5 and SDXL, without a GPU.

Device memory is address space, kernels do nothing, everything else is real: the dispatcher, autograd, the caching
allocator, streams. It shows mixed devices and types, which lines wait for the device, kernels and host time per step,
copies, and the peak of memory of each phase on a card of any size. It does not show values (losses are 1), the time of
kernels, cuDNN's workspaces, and communication between processes. ``make gpu-stub`` runs it.
"""
