// The fused decoder as Python sees it. Argument checks are here and in native/fused.py.
#include <nanobind/stl/string.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "format.h"
#include "fused_decode.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace cachegen {
namespace {

KVType type_of(const std::string& name) {
    if (name == "float16") return KVType::Float16;
    if (name == "bfloat16") return KVType::BFloat16;
    require(name == "float32", "element type");
    return KVType::Float32;
}

// Tuples as native/fused.py makes them; the arrays stay alive as long as this does.
class GroupReader {
public:
    FusedGroup read(const nb::tuple& fields, KVType stored) {
        FusedGroup group{};
        group.tokens = nb::cast<uint64_t>(fields[0]);
        group.channels = nb::cast<uint64_t>(fields[1]);
        for (const nb::handle entry : nb::cast<nb::sequence>(fields[2])) {
            const auto pass = nb::cast<nb::tuple>(entry);
            const auto kind = nb::cast<unsigned>(pass[0]);
            require(kind <= static_cast<unsigned>(PassKind::Sparse), "kind of a pass");
            group.passes.push_back({static_cast<PassKind>(kind), view<uint8_t>(pass[1])});
        }
        if (nb::isinstance<nb::tuple>(fields[3])) {  // with a profile: classes, and where to
            const auto to = nb::cast<nb::tuple>(fields[3]);
            const auto out = nb::cast<Matrix<float>>(to[1], false);
            const auto used = nb::cast<Vector<uint8_t>>(to[2], false);
            group.side.classes = view<uint8_t>(to[0]);
            const Shape shape{group.tokens, group.channels};
            require(out.shape(0) == group.channels && used.size() == group.channels &&
                        out.shape(1) == shape.places() * kLanes, "coefficients");
            group.coefficients = out.data();
            group.used = used.data();
        } else {
            group.side = parse_side(view<uint8_t>(fields[3]), group.tokens, group.channels, stored,
                                    /* plain = */ true);
        }
        const auto constants = nb::cast<nb::tuple>(fields[4]);
        const auto scaling = view<float>(constants[1]);
        require(scaling.size() == 5, "scaling");
        const auto late_below = nb::cast<int>(constants[0]);
        group.key_scaling = {late_below, scaling[0], scaling[1]};
        group.value_scaling = {late_below, scaling[2], scaling[3]};
        group.value_factor = scaling[4];
        group.early_offset = view<float>(constants[2]);
        group.late_offset = view<float>(constants[3]);
        for (const nb::handle entry : nb::cast<nb::sequence>(fields[5])) {
            group.planes.push_back(read_plane(nb::cast<nb::tuple>(entry), group.tokens));
        }
        return group;
    }

    PlaneTarget read_plane(const nb::tuple& plane, uint64_t tokens) {
        const auto offsets = view<int64_t>(plane[1]);
        require(offsets.size() == tokens, "offsets");
        return {reinterpret_cast<std::byte*>(nb::cast<uintptr_t>(plane[0])),
                offsets.data(), nb::cast<int64_t>(plane[2]),
                nb::cast<uint32_t>(plane[3]), nb::cast<uint32_t>(plane[4]),
                nb::cast<int>(plane[5]), nb::cast<int64_t>(plane[6]),
                nb::cast<bool>(plane[7])};
    }

    template <class T>
    std::span<const T> view(nb::handle array) {
        const auto typed = nb::cast<Vector<const T>>(array, /* convert = */ false);
        kept_.push_back(nb::borrow(array));
        return {typed.data(), typed.size()};
    }

private:
    std::vector<nb::object> kept_;
};

void decode(const std::string& type, const std::string& stored, unsigned passes, const Tables& coarse, const Tables& refine,
            const nb::sequence& ropes, const nb::sequence& groups, size_t threads) {
    require(threads >= 1, "threads");
    FusedDecode work{type_of(type), type_of(stored), passes, coarse, refine, threads, {}, {}};
    for (const nb::handle entry : ropes) {
        const auto fields = nb::cast<nb::tuple>(entry);
        const auto frequencies = nb::cast<Vector<const float>>(fields[0], false);
        work.ropes.push_back({{frequencies.data(), frequencies.data() + frequencies.size()},
                              nb::cast<float>(fields[1]), nb::cast<bool>(fields[2])});
    }
    GroupReader reader;
    for (const nb::handle entry : groups)
        work.groups.push_back(reader.read(nb::cast<nb::tuple>(entry), work.stored));
    nb::gil_scoped_release release;
    decode_groups(work);
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
    m.def("finish_plane", finish, "type"_a, "target"_a, "values"_a.noconvert(),
          "mean"_a.noconvert(), "factor"_a, "angles"_a.none(), "interleaved"_a,
          "exempt"_a.noconvert());
}

}  // namespace cachegen
