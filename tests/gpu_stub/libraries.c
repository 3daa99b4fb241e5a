/* Functions of cuBLAS and NCCL that return a value. build.py generates those that only succeed. */
#include "counters.h"
#include <stdlib.h>
#include <string.h>

static int new_object(void **object) {
    *object = calloc(1, 256);
    return 0;
}

/* --- cuBLAS */

int cublasCreate_v2(void **handle) { return new_object(handle); }
int cublasLtMatmulDescCreate(void **description, int compute, int scale) { return new_object(description); }
int cublasLtMatmulPreferenceCreate(void **preference) { return new_object(preference); }

int cublasLtMatrixLayoutCreate(void **layout, int type, unsigned long rows, unsigned long columns, long leading) {
    return new_object(layout);
}

int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

int cublasGetMathMode(void *handle, int *mode) {
    *mode = 0;
    return 0;
}

int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *description, void *a, void *b, void *c, void *d, void *preference, int requested, char *results,
    int *count) {
    memset(results, 0, 96); /* one cublasLtMatmulHeuristicResult_t, without workspace */
    *count = 1;
    return 0;
}

unsigned long cublasLtGetVersion(void) { return 130100; }

/* --- NCCL */

int ncclGetUniqueId(char *id) {
    memset(id, 1, 128);
    return 0;
}

int ncclCommInitRank(void **communicator, ...) { return new_object(communicator); }
int ncclCommInitRankConfig(void **communicator, ...) { return new_object(communicator); }
int ncclCommInitRankScalable(void **communicator, ...) { return new_object(communicator); }

int ncclCommGetAsyncError(void *communicator, int *state) {
    *state = 0;
    return 0;
}

int ncclCommCount(void *communicator, int *count) {
    *count = 1;
    return 0;
}

int ncclGetVersion(int *version) {
    *version = 22307;
    return 0;
}

const char *ncclGetErrorString(int code) { return "no error"; }
const char *ncclGetLastError(void *communicator) { return "no error"; }
