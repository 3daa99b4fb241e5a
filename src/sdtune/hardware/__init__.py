"""Devices, precision, memory, threads and processes of the machine."""
