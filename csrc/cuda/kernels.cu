// All kernels of the library in one program.
#include "tables.cuh"
#include "rows.cuh"
#include "progressive.cuh"
#include "klt.cuh"
#include "gather.cuh"
#include "forward.cuh"
