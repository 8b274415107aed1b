"""Memory, FLOPs and collectives of a train step, compiled for hardware that is not present."""

import glob
import os

# JAX and the compilers read these variables when they are loaded, so they are set before any module imports JAX.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# XLA would log an error for every step that does not fit; the plan says so.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/*"):
    # Without TPUs, libtpu prints warnings that it finds none, even if the topology is of GPUs. These values end its
    # search; what it compiles for is the topology by its name, whatever they say.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
