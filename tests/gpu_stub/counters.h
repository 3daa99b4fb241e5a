/* Indices of the counters; tests/gpu_stub/counters.py has the same names in the same order. */
enum {
    LAUNCH,
    MATRIX_PRODUCT,
    CONVOLUTION,
    STREAM_WAIT,
    DEVICE_WAIT,
    EVENT_WAIT,
    HOST_TO_DEVICE,
    HOST_TO_DEVICE_BYTES,
    DEVICE_TO_HOST,
    DEVICE_TO_HOST_BYTES,
    MALLOC,
    HOST_ALLOC,
    COLLECTIVE,
    COUNTERS
};

#ifdef __cplusplus
extern "C"
#endif
void stub_count(int counter, long long amount);
