/* CUDA runtime of a GPU that does not exist: device memory is reserved address space, kernels do nothing, and calls are
 * counted. torch's dispatcher, allocator, autograd and streams run unchanged above it.
 *
 * Environment: GPU_STUB_GIB (memory of a device), GPU_STUB_DEVICES (number), GPU_STUB_SM (compute capability times 10),
 * GPU_STUB_CONTEXT_MIB (memory that the CUDA context takes).
 */
#define _GNU_SOURCE
#include "counters.h"
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#undef cudaGetDeviceProperties

#define API cudaError_t CUDARTAPI
#define MAX_DEVICES 16
#define PAGE ((size_t)2 << 20) /* the driver hands out memory in pages of 2 MiB */

/* --- counters */

static long long counters[COUNTERS];

void stub_count(int counter, long long amount) { __sync_fetch_and_add(&counters[counter], amount); }
void stub_counters(long long *out) { memcpy(out, counters, sizeof counters); }
void stub_reset_counters(void) { memset(counters, 0, sizeof counters); }

/* --- memory */

typedef struct {
    uintptr_t address;
    size_t bytes;
    int device;
} Block;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Block *blocks;
static int block_count, block_capacity;
static size_t used[MAX_DEVICES], peak[MAX_DEVICES];
static __thread int current_device;

static double setting(const char *name, double standard) {
    const char *value = getenv(name);
    return value ? atof(value) : standard;
}

static size_t total_memory(void) { return (size_t)(setting("GPU_STUB_GIB", 80) * 1073741824.0); }
static size_t context_memory(void) { return (size_t)(setting("GPU_STUB_CONTEXT_MIB", 450) * 1048576.0); }
static int device_count(void) { return (int)setting("GPU_STUB_DEVICES", 1); }

size_t stub_peak(int device) { return peak[device]; }
void stub_reset_peak(int device) { peak[device] = used[device]; }

static int find_block(const void *pointer) {
    for (int i = 0; i < block_count; i++)
        if ((uintptr_t)pointer >= blocks[i].address && (uintptr_t)pointer < blocks[i].address + blocks[i].bytes)
            return i;
    return -1;
}

static int is_device_memory(const void *pointer) {
    pthread_mutex_lock(&mutex);
    int block = find_block(pointer);
    pthread_mutex_unlock(&mutex);
    return block >= 0;
}

static void *reserve(size_t bytes) {
    void *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

API cudaMalloc(void **pointer, size_t bytes) {
    stub_count(MALLOC, 1);
    bytes = (bytes + PAGE - 1) & ~(PAGE - 1);
    *pointer = NULL;
    pthread_mutex_lock(&mutex);
    if (used[current_device] + bytes + context_memory() <= total_memory() && (*pointer = reserve(bytes))) {
        if (block_count == block_capacity) {
            block_capacity = block_capacity ? 2 * block_capacity : 1024;
            blocks = realloc(blocks, block_capacity * sizeof *blocks);
        }
        blocks[block_count++] = (Block){(uintptr_t)*pointer, bytes, current_device};
        used[current_device] += bytes;
        if (used[current_device] > peak[current_device]) peak[current_device] = used[current_device];
    }
    pthread_mutex_unlock(&mutex);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}

API cudaFree(void *pointer) {
    if (!pointer) return cudaSuccess;
    pthread_mutex_lock(&mutex);
    int block = find_block(pointer);
    if (block >= 0) {
        munmap(pointer, blocks[block].bytes);
        used[blocks[block].device] -= blocks[block].bytes;
        blocks[block] = blocks[--block_count];
    }
    pthread_mutex_unlock(&mutex);
    return cudaSuccess;
}

API cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t stream) { return cudaMalloc(pointer, bytes); }
API cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }

API cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    stub_count(HOST_ALLOC, 1);
    *pointer = reserve((bytes + 4095) & ~4095ul);
    return cudaSuccess;
}

API cudaMemGetInfo(size_t *free_memory, size_t *total) {
    size_t taken = used[current_device] + context_memory();
    *total = total_memory();
    *free_memory = taken < *total ? *total - taken : 0;
    return cudaSuccess;
}

API cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = is_device_memory(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    attributes->devicePointer = (void *)pointer;
    return cudaSuccess;
}

/* Values do not travel: a copy to the host yields zeros. */
static void count_copy(void *target, const void *source, size_t bytes) {
    int from_device = is_device_memory(source), to_device = is_device_memory(target);
    if (to_device && !from_device) {
        stub_count(HOST_TO_DEVICE, 1);
        stub_count(HOST_TO_DEVICE_BYTES, bytes);
    } else if (from_device && !to_device) {
        stub_count(DEVICE_TO_HOST, 1);
        stub_count(DEVICE_TO_HOST_BYTES, bytes);
        memset(target, 0, bytes);
    }
}

API cudaMemcpy(void *target, const void *source, size_t bytes, enum cudaMemcpyKind kind) {
    count_copy(target, source, bytes);
    stub_count(STREAM_WAIT, 1);
    return cudaSuccess;
}

API cudaMemcpyAsync(void *target, const void *source, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    count_copy(target, source, bytes);
    return cudaSuccess;
}

/* --- devices */

API cudaGetDeviceCount(int *count) {
    *count = device_count();
    return cudaSuccess;
}

API cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

API cudaSetDevice(int device) {
    if (device < 0 || device >= device_count()) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}

API cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    int sm = (int)setting("GPU_STUB_SM", 90), is_hopper = sm >= 90;
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "stub SM%d %.0f GiB", sm, total_memory() / 1073741824.0);
    p->major = sm / 10;
    p->minor = sm % 10;
    p->totalGlobalMem = total_memory();
    p->multiProcessorCount = is_hopper ? 132 : 128;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = is_hopper ? 2048 : 1536;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = is_hopper ? 232448 : 101376;
    p->sharedMemPerMultiprocessor = is_hopper ? 233472 : 102400;
    p->reservedSharedMemPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 50 << 20;
    p->memPitch = 2147483647;
    p->totalConstMem = 65536;
    p->textureAlignment = 512;
    p->maxBlocksPerMultiProcessor = 32;
    p->pciBusID = 1 + device;
    return cudaSuccess;
}

API cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, device);
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    default: *value = 1;
    }
    return cudaSuccess;
}

API cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

API cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

API cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 1;
    return cudaSuccess;
}

API cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

/* --- streams, events, waits */

API cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    static uintptr_t last = 0x5000;
    *stream = (cudaStream_t)__sync_add_and_fetch(&last, 16);
    return cudaSuccess;
}

API cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

API cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

API cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

API cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *count) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

API cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

API cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)malloc(16);
    return cudaSuccess;
}

API cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

API cudaEventDestroy(cudaEvent_t event) {
    free((void *)event);
    return cudaSuccess;
}

API cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 1;
    return cudaSuccess;
}

API cudaStreamSynchronize(cudaStream_t stream) {
    stub_count(STREAM_WAIT, 1);
    return cudaSuccess;
}

API cudaDeviceSynchronize(void) {
    stub_count(DEVICE_WAIT, 1);
    return cudaSuccess;
}

API cudaEventSynchronize(cudaEvent_t event) {
    stub_count(EVENT_WAIT, 1);
    return cudaSuccess;
}

/* --- kernels */

API cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    stub_count(LAUNCH, 1);
    return cudaSuccess;
}

API cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    stub_count(LAUNCH, 1);
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    stub_count(LAUNCH, 1);
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *entry) {
    *kernel = (cudaKernel_t)entry;
    return cudaSuccess;
}

char __cudaInitModule(void **handle) { return 1; }

API cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    function(data);
    return cudaSuccess;
}

API cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 90;
    attributes->maxDynamicSharedSizeBytes = 49152;
    return cudaSuccess;
}

API cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks_per_sm, const void *kernel, int block, size_t shared, unsigned flags) {
    *blocks_per_sm = 2;
    return cudaSuccess;
}

/* --- driver functions that torch asks the runtime for */

static int success(void) { return 0; }

static int context_state(int device, unsigned *flags, int *is_active) {
    if (flags) *flags = 0;
    if (is_active) *is_active = 1;
    return 0;
}

static int current_context(void **context) {
    *context = (void *)0x1234;
    return 0;
}

static int granularity(size_t *bytes, void *properties, int option) {
    *bytes = PAGE;
    return 0;
}

API cudaGetDriverEntryPointByVersion(
    const char *symbol, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
    if (result) *result = cudaDriverEntryPointSuccess;
    *function = (void *)success;
    if (!strcmp(symbol, "cuDevicePrimaryCtxGetState")) *function = (void *)context_state;
    if (!strcmp(symbol, "cuCtxGetCurrent")) *function = (void *)current_context;
    if (!strcmp(symbol, "cuMemGetAllocationGranularity")) *function = (void *)granularity;
    return cudaSuccess;
}
