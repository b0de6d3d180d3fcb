// The fused encoder as Python sees it. Argument checks are here and in native/fused_encode.py.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bindings.h"
#include "encode_tables.h"
#include "fused_encode.h"
#include "medians.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace cachegen {
namespace {

template <class T>
nb::bytes bytes_of(const std::vector<T>& values) {
    return nb::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// The groups of one chunk, from tuples as native/fused_encode.py makes them; what they view stays
// alive as long as this does.
class ChunkEncoder {
public:
    ChunkEncoder(const ChunkEncoder&) = delete;
    explicit ChunkEncoder(const nb::sequence& groups) {
        for (const nb::handle entry : groups) read_group(nb::cast<nb::tuple>(entry));
    }

    void survey(size_t threads) {
        require(threads >= 1, "threads");
        nb::gil_scoped_release release;
        survey_groups(groups_, threads);
    }

    nb::tuple surveyed(size_t index) const {
        const EncodeGroup& group = groups_.at(index);
        return nb::make_tuple(group.refused, group.energy);
    }

    void encode(float step, unsigned passes, const nb::sequence& base_classes,
                const EncodeTables& tables,
                const Array<const int16_t, nb::ndim<3>>& costs,
                const Array<const double, nb::ndim<4>>& centroids, size_t threads) {
        require(passes >= 1 && passes <= kMaxPasses && threads >= 1 && step > 0, "passes");
        require(2 * costs.shape(0) == kCoarseCounts + kRefineCounts * (passes - 1) &&
                    costs.shape(1) == kWays && costs.shape(2) == 2, "costs");
        require(centroids.shape(0) == kDecays && centroids.shape(1) == passes &&
                    centroids.shape(2) == 2 && centroids.shape(3) == 64, "centroids");
        require(tables.rows() == 3 * 88, "tables");
        require(nb::len(base_classes) == groups_.size(), "base classes");
        for (size_t i = 0; i < groups_.size(); ++i)
            if (groups_[i].components) {
                groups_[i].base_classes = view<uint8_t>(base_classes[i]);
                require(groups_[i].base_classes.size() == groups_[i].shape.channels,
                        "base classes");
            }
        const EncodeSettings settings{passes, tables, costs.data(), centroids.data()};
        nb::gil_scoped_release release;
        stores_ = encode_groups(groups_, settings, step, threads);
    }

    // Bodies are views of this encoder's memory, which `self` keeps alive.
    static nb::tuple encoded(const nb::object& self, size_t index) {
        const EncodeGroup& group = nb::cast<const ChunkEncoder&>(self).groups_.at(index);
        nb::list exempt, errors, passes;
        for (const uint32_t token : group.exempt) exempt.append(token);
        for (const auto& way : group.errors)
            for (size_t pass = 0; pass < group.passes.size(); ++pass) errors.append(way[pass]);
        for (const EncodedPass& pass : group.passes)
            passes.append(nb::make_tuple(static_cast<int>(pass.kind),
                                         Body(pass.body.data(), {pass.body.size()}, self)));
        return nb::make_tuple(exempt, bytes_of(group.mean_levels), group.mean_scale,
                              bytes_of(group.classes), group.class_offset, errors, passes);
    }

private:
    using Body = nb::ndarray<const uint8_t, nb::numpy, nb::ndim<1>>;

    void read_group(const nb::tuple& fields) {
        EncodeGroup group;
        group.shape = {nb::cast<uint64_t>(fields[0]), nb::cast<uint64_t>(fields[1])};
        require(group.shape.channels == 0 ||
                    group.shape.tokens <= (uint64_t{1} << 32) / group.shape.channels, "group");
        const size_t columns = group.shape.places() * kLanes;
        uint64_t channels = 0;
        for (const nb::handle entry : nb::cast<nb::sequence>(fields[2])) {
            group.planes.push_back(read_plane(nb::cast<nb::tuple>(entry), columns));
            channels += uint64_t{group.planes.back().heads} * group.planes.back().dim;
        }
        if (!fields[3].is_none()) {
            const auto components = nb::cast<Matrix<const float>>(fields[3], false);
            require(components.shape(0) == group.shape.channels &&
                        components.shape(1) == columns && group.planes.empty(), "components");
            group.components = components.data();
            group.families = view<uint8_t>(fields[4]);
            require(group.families.size() == group.shape.channels &&
                        std::all_of(group.families.begin(), group.families.end(),
                                    [](uint8_t f) { return f < 3; }), "classes");
            kept_.push_back(nb::borrow(fields[3]));
        } else {
            require(channels == group.shape.channels, "planes");
        }
        group.exempt = nb::cast<std::vector<uint32_t>>(fields[5]);
        for (size_t i = 0; i < group.exempt.size(); ++i)
            require(group.exempt[i] < group.shape.tokens &&
                        (i == 0 || group.exempt[i] > group.exempt[i - 1]), "exempt tokens");
        groups_.push_back(std::move(group));
    }

    EncodePlane read_plane(const nb::tuple& fields, size_t columns) {
        EncodePlane plane{};
        plane.data = reinterpret_cast<const std::byte*>(nb::cast<uintptr_t>(fields[0]));
        plane.type = type_of(nb::cast<std::string>(fields[1]));
        plane.token_stride = nb::cast<int64_t>(fields[2]);
        plane.head_stride = nb::cast<int64_t>(fields[3]);
        plane.heads = nb::cast<uint32_t>(fields[4]);
        plane.dim = nb::cast<uint32_t>(fields[5]);
        plane.weight = nb::cast<float>(fields[6]);
        if (fields[7].is_none()) return plane;
        const auto angles = nb::cast<Array<const float, nb::ndim<3>>>(fields[7], false);
        require(angles.shape(0) == 2 && 2 * angles.shape(1) <= plane.dim &&
                    angles.shape(2) == columns, "angles");
        plane.half = angles.shape(1);
        plane.cos = angles.data();
        plane.sin = angles.data() + plane.half * columns;
        plane.interleaved = nb::cast<bool>(fields[8]);
        kept_.push_back(nb::borrow(fields[7]));
        return plane;
    }

    template <class T>
    std::span<const T> view(nb::handle array) {
        const auto typed = nb::cast<Vector<const T>>(array, /* convert = */ false);
        kept_.push_back(nb::borrow(array));
        return {typed.data(), typed.size()};
    }

    std::vector<EncodeGroup> groups_;
    std::vector<BodyStore> stores_;  // where their bodies are
    std::vector<nb::object> kept_;
};

void medians(const Matrix<const float>& values, const Vector<float>& out) {
    require(out.size() == values.shape(1), "medians");
    nb::gil_scoped_release release;
    column_medians(values.data(), values.shape(0), values.shape(1), out.data());
}

}  // namespace

void bind_encode(nb::module_& m) {
    nb::class_<EncodeTables>(m, "EncodeTables")
        .def(nb::init<const Tables&, const Tables&>(), "coarse"_a, "refine"_a);
    nb::class_<ChunkEncoder>(m, "ChunkEncoder")
        .def(nb::init<const nb::sequence&>(), "groups"_a)
        .def("survey", &ChunkEncoder::survey, "threads"_a)
        .def("surveyed", &ChunkEncoder::surveyed, "index"_a)
        .def("encode", &ChunkEncoder::encode, "step"_a, "passes"_a, "base_classes"_a, "tables"_a,
             "costs"_a.noconvert(), "centroids"_a.noconvert(), "threads"_a)
        .def("encoded", &ChunkEncoder::encoded, "index"_a);
    m.def("column_medians", medians, "values"_a.noconvert(), "out"_a.noconvert());
}

}  // namespace cachegen
