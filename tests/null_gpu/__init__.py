"""A GPU that computes nothing, to rehearse CUDA code where there is no GPU.

    python -m tests.null_gpu -m pytest -m cuda tests/test_cuda.py

runs that Python command with libraries in place of CUDA's runtime, driver and cuBLAS. torch sees an H200: its
memory is the host's, copies are made, kernels are launched and not run. So no number is right, and all that
the host does is real: what is exported, compiled (by Triton for sm_90 too) and loaded, launched on which
stream, waited for, captured into a graph. In a capture this GPU refuses what a real one refuses.
ONNX Runtime has a stand-in too, which checks what is bound to it and runs nothing; torch's profiler sees
nothing. `python -m tests.null_gpu -m benchmarks.gpu --architecture tiny` rehearses the GPU suite.

Needs torch with CUDA 13 from pip, gcc, and CUDA's headers (pip install nvidia-cuda-crt nvidia-cuda-cccl). The
plugin leaves out the tests' comparisons of numbers, and expects the tests marked `numbers` to fail in their
assertions alone. What was compiled is dropped at the end, unless NULL_GPU_CACHE names a folder for it.
"""
