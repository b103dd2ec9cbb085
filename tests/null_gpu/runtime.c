// CUDA's runtime without a GPU. Memory is the host's, kernels are counted, captures are followed.
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TOTAL ((size_t)139 << 30)
#define ALIGNED 512

// ---------------------------------------------------------------- errors

static __thread cudaError_t last = cudaSuccess;

static cudaError_t fail(cudaError_t error, const char *what) {
    fprintf(stderr, "null gpu: %s: error %d\n", what, error);
    return last = error;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorName(cudaError_t error) { return error ? "cudaError" : "cudaSuccess"; }

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureImplicit: return "work on a stream that is not captured, within a capture";
    case cudaErrorStreamCaptureInvalidated: return "the capture was invalidated";
    default: return "an error of the null gpu";
    }
}

// ---------------------------------------------------------------- streams and captures

typedef struct {
    int status; // a cudaStreamCaptureStatus
    unsigned long long id;
    long nodes;
} Stream;

static Stream legacy;
static unsigned long long captures;
static __thread Stream *captured; // by this thread
static __thread enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

static Stream *stream_of(const void *handle) {
    return handle == NULL || handle == cudaStreamLegacy || handle == cudaStreamPerThread ? &legacy : (Stream *)handle;
}

static int forbidden(void) { return captured != NULL && mode != cudaStreamCaptureModeRelaxed; }

static cudaError_t not_in_a_capture(const char *what) {
    if (!forbidden()) return cudaSuccess;
    captured->status = cudaStreamCaptureStatusInvalidated;
    return fail(cudaErrorStreamCaptureUnsupported, what);
}

#define OUTSIDE(what)                                                                                                  \
    do {                                                                                                               \
        cudaError_t error = not_in_a_capture(what);                                                                    \
        if (error) return error;                                                                                       \
    } while (0)

// Some work on a stream. While a thread captures one, its work on another would be lost from the graph.
cudaError_t null_gpu_work(void *handle, const char *what) {
    Stream *stream = stream_of(handle);
    if (forbidden() && stream != captured) return fail(cudaErrorStreamCaptureImplicit, what);
    if (stream->status) stream->nodes++;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = (cudaStream_t)calloc(1, sizeof(Stream));
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return stream_of(stream)->status ? fail(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery") : cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    OUTSIDE("cudaStreamSynchronize");
    return cudaStreamQuery(stream);
}
cudaError_t cudaDeviceSynchronize(void) {
    OUTSIDE("cudaDeviceSynchronize");
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = (enum cudaStreamCaptureStatus)stream_of(stream)->status;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    Stream *own = stream_of(stream);
    *status = (enum cudaStreamCaptureStatus)own->status;
    if (id) *id = own->id;
    if (graph) *graph = (cudaGraph_t)own;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *exchanged) {
    enum cudaStreamCaptureMode before = mode;
    mode = *exchanged;
    *exchanged = before;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode how) {
    Stream *stream = stream_of(handle);
    if (stream == &legacy) return fail(cudaErrorStreamCaptureUnsupported, "a capture of the legacy stream");
    *stream = (Stream){cudaStreamCaptureStatusActive, ++captures, 0};
    captured = stream, mode = how;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
    Stream *stream = stream_of(handle);
    int invalid = stream->status == cudaStreamCaptureStatusInvalidated;
    long *nodes = malloc(sizeof *nodes);
    *nodes = stream->nodes;
    *graph = (cudaGraph_t)nodes;
    stream->status = cudaStreamCaptureStatusNone;
    captured = NULL, mode = cudaStreamCaptureModeGlobal;
    return invalid ? fail(cudaErrorStreamCaptureInvalidated, "the end of a capture") : cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    *made = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = *(long *)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { return null_gpu_work(stream, "a graph"); }

// ---------------------------------------------------------------- memory

typedef struct {
    char *start;
    size_t size;
    enum cudaMemoryType type;
    void *owned; // to be freed; NULL for memory that was registered
} Block;

static Block *blocks;
static size_t count, room, used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void add(Block block) {
    pthread_mutex_lock(&lock);
    if (count == room) blocks = realloc(blocks, (room = room ? 2 * room : 1024) * sizeof *blocks);
    blocks[count++] = block;
    if (block.type == cudaMemoryTypeDevice) used += block.size;
    pthread_mutex_unlock(&lock);
}

static void drop(void *start) {
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count; i++)
        if (blocks[i].start == start) {
            if (blocks[i].type == cudaMemoryTypeDevice) used -= blocks[i].size;
            free(blocks[i].owned);
            blocks[i] = blocks[--count];
            break;
        }
    pthread_mutex_unlock(&lock);
}

enum cudaMemoryType null_gpu_memory(const void *address) {
    enum cudaMemoryType type = cudaMemoryTypeUnregistered;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count; i++)
        if ((char *)address >= blocks[i].start && (char *)address < blocks[i].start + blocks[i].size) {
            type = blocks[i].type;
            break;
        }
    pthread_mutex_unlock(&lock);
    return type;
}

static cudaError_t allocate(void **address, size_t size, enum cudaMemoryType type) {
    *address = NULL;
    if (size == 0) return cudaSuccess;
    void *owned = type == cudaMemoryTypeDevice && used + size > TOTAL ? NULL : calloc(1, size + ALIGNED);
    if (owned == NULL) return fail(cudaErrorMemoryAllocation, "an allocation");
    char *start = (char *)(((size_t)owned + ALIGNED - 1) & ~(size_t)(ALIGNED - 1));
    add((Block){start, size, type, owned});
    *address = start;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **address, size_t size) {
    OUTSIDE("cudaMalloc");
    return allocate(address, size, cudaMemoryTypeDevice);
}
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
    OUTSIDE("cudaHostAlloc");
    return allocate(address, size, cudaMemoryTypeHost);
}
cudaError_t cudaFree(void *address) {
    OUTSIDE("cudaFree");
    drop(address);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *address) {
    OUTSIDE("cudaFreeHost");
    drop(address);
    return cudaSuccess;
}
cudaError_t cudaHostRegister(void *address, size_t size, unsigned flags) {
    add((Block){address, size, cudaMemoryTypeHost, NULL});
    return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *address) {
    drop(address);
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = TOTAL, *available = TOTAL - used;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = null_gpu_memory(address);
    attributes->device = attributes->type == cudaMemoryTypeUnregistered ? -2 : 0;
    if (attributes->type != cudaMemoryTypeUnregistered) attributes->devicePointer = (void *)address;
    if (attributes->type == cudaMemoryTypeHost) attributes->hostPointer = (void *)address;
    return cudaSuccess;
}

// Made at once, as everything here is; in a capture not at all, as only a graph's launch would make it.
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    int pageable = null_gpu_memory(to) == cudaMemoryTypeUnregistered || null_gpu_memory(from) == cudaMemoryTypeUnregistered;
    if (stream_of(stream)->status && pageable)
        return fail(cudaErrorStreamCaptureUnsupported, "a copy of pageable memory in a capture");
    cudaError_t error = null_gpu_work(stream, "a copy");
    if (!error && !stream_of(stream)->status) memmove(to, from, size);
    return error;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    OUTSIDE("cudaMemcpy");
    return cudaMemcpyAsync(to, from, size, kind, NULL);
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
    cudaError_t error = null_gpu_work(stream, "a memset");
    if (!error && !stream_of(stream)->status) memset(to, value, size);
    return error;
}
cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, NULL); }
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char symbols[1 << 20];
    *address = symbols;
    return cudaSuccess;
}

// ---------------------------------------------------------------- the device: an H200

int null_gpu_attribute(int attribute) {
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrL2CacheSize: return 60 << 20;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 3201000;
    case cudaDevAttrGlobalMemoryBusWidth: return 6144;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrConcurrentKernels: case cudaDevAttrUnifiedAddressing: case cudaDevAttrCooperativeLaunch: return 1;
    default: return 0;
    }
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = null_gpu_attribute(attribute);
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *made, int device) {
    memset(made, 0, sizeof *made);
    strcpy(made->name, "NVIDIA H200 (null)");
    made->totalGlobalMem = TOTAL;
    made->major = 9;
    made->warpSize = 32;
    made->multiProcessorCount = 132;
    made->maxThreadsPerBlock = made->maxThreadsDim[0] = made->maxThreadsDim[1] = 1024;
    made->maxThreadsDim[2] = 64;
    made->maxGridSize[0] = 2147483647;
    made->maxGridSize[1] = made->maxGridSize[2] = 65535;
    made->maxThreadsPerMultiProcessor = 2048;
    made->maxBlocksPerMultiProcessor = 32;
    made->regsPerBlock = made->regsPerMultiprocessor = 65536;
    made->sharedMemPerBlock = 49152;
    made->sharedMemPerBlockOptin = 232448;
    made->sharedMemPerMultiprocessor = 233472;
    made->l2CacheSize = 60 << 20;
    made->memoryBusWidth = 6144;
    made->unifiedAddressing = made->concurrentKernels = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *devices) {
    *devices = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device ? fail(cudaErrorInvalidDevice, "cudaSetDevice") : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
    snprintf(id, size, "0000:01:00.0");
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(dlopen("libcuda.so.1", RTLD_LAZY), name);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *function ? cudaSuccess : fail(cudaErrorUnknown, name);
}

// ---------------------------------------------------------------- events: what the host's clock says

static double milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)calloc(1, sizeof(double));
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    *(double *)event = milliseconds();
    return null_gpu_work(stream, "an event");
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaEventQuery(cudaEvent_t event) {
    OUTSIDE("cudaEventQuery");
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    OUTSIDE("cudaEventSynchronize");
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *elapsed, cudaEvent_t from, cudaEvent_t to) {
    *elapsed = (float)(*(double *)to - *(double *)from);
    if (*elapsed < 1e-3f) *elapsed = 1e-3f;
    return cudaSuccess;
}

// ---------------------------------------------------------------- kernels

typedef struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} Launch;

static __thread Launch launches[16];
static __thread unsigned depth;

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
char __cudaInitModule(void **handle) { return 1; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    launches[depth++ % 16] = (Launch){grid, block, shared, stream};
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    Launch launch = launches[--depth % 16];
    *grid = launch.grid, *block = launch.block, *shared = launch.shared, *(void **)stream = launch.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return null_gpu_work(stream, "a kernel");
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    return null_gpu_work(stream, "a kernel");
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *kernel, void **arguments) {
    return null_gpu_work(how->stream, "a kernel");
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024, attributes->numRegs = 64;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    attributes->maxDynamicSharedSizeBytes = 232448;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_there, const void *kernel, int size,
                                                                   size_t shared, unsigned flags) {
    *blocks_there = 8;
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *given) {
    function(given);
    return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *given, unsigned flags) {
    function(stream, cudaSuccess, given);
    return cudaSuccess;
}
