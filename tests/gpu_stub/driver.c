/* Functions of the CUDA driver (libcuda.so.1) that return a value. build.py generates those that only succeed. */
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

int cuDeviceGetCount(int *count) { return cudaGetDeviceCount(count); }
int cuCtxGetDevice(int *device) { return cudaGetDevice(device); }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return 0;
}

int cuDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
    if (flags) *flags = 0;
    if (is_active) *is_active = 1;
    return 0;
}

int cuCtxGetCurrent(void **context) {
    *context = (void *)0x1234;
    return 0;
}

int cuPointerGetAttribute(void *data, int attribute, unsigned long long pointer) {
    *(unsigned long long *)data = pointer;
    return 0;
}
