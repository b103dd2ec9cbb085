// cuBLAS without a GPU: products are launched and not made.
#include <driver_types.h>
#include <stdlib.h>

typedef struct {
    void *stream;
    int mode;
} Handle;

cudaError_t null_gpu_work(void *stream, const char *what);

int cublasCreate_v2(Handle **handle) {
    *handle = calloc(1, sizeof **handle);
    return 0;
}
int cublasSetStream_v2(Handle *handle, void *stream) {
    handle->stream = stream;
    return 0;
}
int cublasGetStream_v2(Handle *handle, void **stream) {
    *stream = handle->stream;
    return 0;
}
int cublasSetMathMode(Handle *handle, int mode) {
    handle->mode = mode;
    return 0;
}
int cublasGetMathMode(Handle *handle, int *mode) {
    *mode = handle->mode;
    return 0;
}
int cublasGetPointerMode_v2(Handle *handle, int *mode) {
    *mode = 0;
    return 0;
}

#define PRODUCT(name)                                                                                                  \
    int name(Handle *handle) { return null_gpu_work(handle->stream, #name) ? 13 : 0; }
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasDgemv_v2)
