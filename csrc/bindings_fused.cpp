// The fused decoder as Python sees it. Argument checks are here and in native/fused.py.
#include <nanobind/stl/string.h>

#include <string>

#include "bindings_groups.h"
#include "fused_decode.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace cachegen {
namespace {

void decode(const std::string& type, const std::string& stored, unsigned passes, const Tables& coarse, const Tables& refine,
            const nb::sequence& ropes, const nb::sequence& groups, size_t threads) {
    require(threads >= 1, "threads");
    FusedDecode work{type_of(type), type_of(stored), passes, coarse, refine, threads, {}, {}};
    GroupReader reader;
    for (const nb::handle entry : ropes)
        work.ropes.push_back(reader.read_rope(nb::cast<nb::tuple>(entry)));
    for (const nb::handle entry : groups)
        work.groups.push_back(reader.read(nb::cast<nb::tuple>(entry), work.stored));
    nb::gil_scoped_release release;
    decode_groups(work);
}

// As __array_struct__ lays it out (NumPy's array interface, version 3).
struct ArrayInterface {
    int two, dimensions;
    char kind;
    int item_size, flags;
    Py_intptr_t *shape, *strides;
    void* data;
    PyObject* description;
};

// __array_interface__ says the same, and takes ten times as long.
uintptr_t data_address(const nb::object& array) {
    const nb::object capsule = array.attr("__array_struct__");
    const auto* const fields =
        static_cast<const ArrayInterface*>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
    if (!fields) throw nb::python_error();
    require(fields->two == 2, "array");
    return reinterpret_cast<uintptr_t>(fields->data);
}

void finish(const std::string& type, const nb::tuple& target, const Matrix<const float>& values,
            const Vector<const float>& mean, float factor, const nb::object& angles,
            bool interleaved, const Vector<const uint8_t>& exempt) {
    GroupReader reader;
    FinishPlane work{};
    work.type = type_of(type);
    work.tokens = exempt.size();
    work.plane = reader.read_plane(target, work.tokens);
    const size_t width = size_t{work.plane.heads} * work.plane.dim;
    const Shape shape{work.tokens, width};
    require(values.shape(0) == shape.places() * kLanes && values.shape(1) == width &&
                mean.size() == width, "values");
    work.values = values.data();
    work.row_stride = width;
    work.mean = mean.data();
    work.factor = factor;
    work.interleaved = interleaved;
    work.exempt = {exempt.data(), exempt.size()};
    if (!angles.is_none()) {
        const auto pair = nb::cast<Array<const float, nb::ndim<3>>>(angles, false);
        require(pair.shape(0) == 2 && pair.shape(1) == work.tokens &&
                    2 * pair.shape(2) <= work.plane.dim, "angles");
        work.half = pair.shape(2);
        work.cos = pair.data();
        work.sin = pair.data() + work.tokens * work.half;
    }
    nb::gil_scoped_release release;
    finish_plane(work);
}

}  // namespace

void bind_fused(nb::module_& m) {
    m.def("decode_groups", decode, "type"_a, "stored"_a, "passes"_a, "coarse"_a, "refine"_a, "ropes"_a,
          "groups"_a, "threads"_a);
    m.def("data_address", data_address, "array"_a);
    m.def("finish_plane", finish, "type"_a, "target"_a, "values"_a.noconvert(),
          "mean"_a.noconvert(), "factor"_a, "angles"_a.none(), "interleaved"_a,
          "exempt"_a.noconvert());
}

}  // namespace cachegen
