// What the files that see Python share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>

#include "error.h"
#include "float_bits.h"

namespace cachegen {

template <class T, class... Extra>
using Array = nanobind::ndarray<T, nanobind::device::cpu, nanobind::c_contig, Extra...>;
template <class T>
using Vector = Array<T, nanobind::ndim<1>>;
template <class T>
using Matrix = Array<T, nanobind::ndim<2>>;

inline void require(bool sound, const char* what) {
    if (!sound)
        throw Error(ErrorKind::Geometry, what, "sizes that do not fit", "sizes that do");
}

inline KVType type_of(const std::string& name) {
    if (name == "float16") return KVType::Float16;
    if (name == "bfloat16") return KVType::BFloat16;
    require(name == "float32", "element type");
    return KVType::Float32;
}

void bind_fused(nanobind::module_& m);
void bind_encode(nanobind::module_& m);
void bind_lossless(nanobind::module_& m);
void bind_planes(nanobind::module_& m);
void bind_profile(nanobind::module_& m);
void bind_sparse(nanobind::module_& m);

}  // namespace cachegen
