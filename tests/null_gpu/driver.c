// CUDA's driver without a GPU: what Triton's launchers and compiled packages call.
#define _GNU_SOURCE
#include <cuda.h>
#include <driver_types.h>
#include <dlfcn.h>
#include <stdio.h>

#define MOST_SHARED 232448 // bytes a block

cudaError_t null_gpu_work(void *stream, const char *what);
enum cudaMemoryType null_gpu_memory(const void *address);
int null_gpu_attribute(int attribute);

static int thing; // whatever a handle is wanted for

CUresult cuDriverGetVersion(int *version) {
    *version = 13000;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error ? "an error of the null gpu" : "no error";
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
    *count = 1;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    snprintf(name, size, "NVIDIA H200 (null)");
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = null_gpu_attribute(attribute);
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)&thing;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0, *active = 1;
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return cuDevicePrimaryCtxRetain(context, 0); }
CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)&thing;
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
CUresult cuModuleLoad(CUmodule *module, const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) return CUDA_ERROR_FILE_NOT_FOUND;
    fclose(file);
    return cuModuleLoadData(module, path);
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)&thing;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
static CUresult launch(unsigned x, unsigned y, unsigned z, unsigned shared, void *stream) {
    if (!x || !y || !z || y > 65535 || z > 65535 || shared > MOST_SHARED) {
        fprintf(stderr, "null gpu: a launch of %u x %u x %u blocks with %u bytes\n", x, y, z, shared);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return null_gpu_work(stream, "a kernel") ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **arguments, void **extra) {
    return launch(x, y, z, shared, stream);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **arguments, void **extra) {
    return launch(how->gridDimX, how->gridDimY, how->gridDimZ, how->sharedMemBytes, how->hStream);
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function, int size, size_t shared) {
    *blocks = 8;
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *how) {
    *clusters = 8;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    if (null_gpu_memory((void *)address) != cudaMemoryTypeDevice) return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr *)value = attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER ? address : 0;
    return CUDA_SUCCESS;
}
