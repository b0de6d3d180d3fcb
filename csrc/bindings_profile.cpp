// Decoding with a profile as Python sees it. Argument checks are here and in native/transform.py.
#include <nanobind/stl/string.h>

#include <string>

#include "bindings_groups.h"
#include "packed_basis.h"
#include "transform_decode.h"

namespace cachegen {
namespace {

using namespace nb::literals;

// A basis and the mean of its channels, with the arrays that they are.
struct KeptBasis {
    KeptBasis(const Matrix<const float>& values, const Vector<const float>& mean,
              const Vector<const uint32_t>& dims)
        : array(values), mean(mean),
          packed(values.data(), values.shape(0), {dims.data(), dims.size()}) {}
    Matrix<const float> array;
    Vector<const float> mean;
    PackedBasis packed;
};

TransformGroup read_group(GroupReader& reader, const nb::tuple& fields, KVType stored) {
    TransformGroup group{};
    FusedGroup& decoded = group.decoded;
    decoded.tokens = nb::cast<uint64_t>(fields[0]);
    reader.read_passes(nb::cast<nb::sequence>(fields[1]), decoded);
    const auto& basis = nb::cast<const KeptBasis&>(fields[3]);
    group.basis = &basis.packed;
    decoded.channels = basis.packed.channels();
    decoded.side = parse_side(reader.view<uint8_t>(fields[2]), decoded.tokens, decoded.channels,
                              stored, /* plain = */ false);
    decoded.side.classes = reader.view<uint8_t>(fields[4]);
    require(decoded.side.classes.size() == decoded.channels, "classes");
    for (const uint8_t both : decoded.side.classes)
        require(both < kFamilies * kClasses, "class");
    group.mean = basis.mean.data();
    reader.read_constants(nb::cast<nb::tuple>(fields[5]), decoded);
    for (const nb::handle entry : nb::cast<nb::sequence>(fields[6])) {
        const PlaneTarget plane = reader.read_plane(nb::cast<nb::tuple>(entry), decoded.tokens);
        group.planes.push_back(plane);
        group.factors.push_back(plane.is_value ? decoded.value_factor : 1.0f);
    }
    return group;
}

void decode(const std::string& type, const std::string& stored, unsigned passes,
            const Tables& coarse, const Tables& refine, const nb::sequence& ropes,
            const nb::sequence& groups, size_t threads) {
    require(threads >= 1, "threads");
    FusedDecode work{type_of(type), type_of(stored), passes, coarse, refine, threads, {}, {}};
    GroupReader reader;
    for (const nb::handle entry : ropes)
        work.ropes.push_back(reader.read_rope(nb::cast<nb::tuple>(entry)));
    TransformDecode decoding{work, {}};
    for (const nb::handle entry : groups)
        decoding.groups.push_back(read_group(reader, nb::cast<nb::tuple>(entry), work.stored));
    nb::gil_scoped_release release;
    decode_transformed(decoding);
}

}  // namespace

void bind_profile(nb::module_& m) {
    using namespace nb::literals;
    nb::class_<KeptBasis>(m, "PackedBasis")
        .def(
            "__init__",
            [](KeptBasis* self, const Matrix<const float>& values, const Vector<const float>& mean,
               const Vector<const uint32_t>& dims) {
                require(values.shape(0) == values.shape(1) && mean.size() == values.shape(0),
                        "basis");
                new (self) KeptBasis(values, mean, dims);
            },
            "values"_a.noconvert(), "mean"_a.noconvert(), "dims"_a.noconvert())
        .def_prop_ro("is_joint", [](const KeptBasis& self) { return self.packed.is_joint(); });
    m.def("decode_transformed", decode, "type"_a, "stored"_a, "passes"_a, "coarse"_a, "refine"_a,
          "ropes"_a, "groups"_a, "threads"_a);
    m.def(
        "can_transform",
        [](const std::string& type) { return product_kernel(type_of(type)) != nullptr; },
        "type"_a);
    m.def("allow_tiles", allow_tiles, "allowed"_a);
    m.def("uses_tiles", [](const std::string& type) {
        const ProductKernel* const kernel = product_kernel(type_of(type));
        return kernel && kernel->form == BasisForm::Tiles;
    }, "type"_a);
}

}  // namespace cachegen
