// Coding of whole planes as Python sees it. Argument checks are here and in native/planes.py.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings.h"
#include "channel_models.h"
#include "format.h"
#include "plane_decode.h"
#include "plane_encode.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace cachegen {
namespace {

// Tuples as native/planes.py makes them; the arrays stay alive as long as this does.
class PlaneReader {
public:
    QuantizedPlane read(const nb::tuple& fields) {
        QuantizedPlane plane{};
        plane.tokens = nb::cast<uint64_t>(fields[0]);
        plane.group_tokens = nb::cast<unsigned>(fields[1]);
        for (const nb::handle entry : nb::cast<nb::sequence>(fields[2]))
            plane.passes.push_back(read_pass(nb::cast<nb::tuple>(entry)));
        const auto to = nb::cast<nb::tuple>(fields[3]);
        const auto offsets = view<int64_t>(to[1]);
        require(offsets.size() == plane.tokens, "offsets");
        plane.target = {reinterpret_cast<std::byte*>(nb::cast<uintptr_t>(to[0])),
                        offsets.data(), nb::cast<int64_t>(to[2]), nb::cast<uint32_t>(to[3]),
                        nb::cast<uint32_t>(to[4]), -1, 0, nb::cast<bool>(to[7])};
        return plane;
    }

private:
    MatrixSource read_pass(const nb::tuple& fields) {
        MatrixSource pass{};
        pass.rows = nb::cast<uint64_t>(fields[0]);
        const auto kind = nb::cast<unsigned>(fields[1]);
        require(kind <= static_cast<unsigned>(MatrixKind::Packed), "kind of a matrix");
        pass.kind = static_cast<MatrixKind>(kind);
        pass.bits = nb::cast<unsigned>(fields[2]);
        require(pass.bits <= 8, "bits of a matrix");
        pass.body = view<uint8_t>(fields[3]);
        pass.freqs = view<uint8_t>(fields[4]);
        pass.alphabet = nb::cast<size_t>(fields[5]);
        pass.classes = view<uint8_t>(fields[6]);
        pass.rotations = view<uint8_t>(fields[7]);
        pass.shift = nb::cast<unsigned>(fields[8]);
        pass.low_bits = nb::cast<unsigned>(fields[9]);
        pass.low = view<uint8_t>(fields[10]);
        pass.levels = nb::cast<unsigned>(fields[11]);
        pass.scales = view<uint8_t>(fields[12]);
        pass.per_head = nb::cast<bool>(fields[13]);
        return pass;
    }

    template <class T>
    std::span<const T> view(nb::handle array) {
        const auto typed = nb::cast<Vector<const T>>(array, /* convert = */ false);
        kept_.push_back(nb::borrow(array));
        return {typed.data(), typed.size()};
    }

    std::vector<nb::object> kept_;
};

void decode(const std::string& type, const std::string& stored, const Tables& shared,
            const nb::sequence& planes, size_t threads) {
    require(threads >= 1, "threads");
    PlaneDecode work{type_of(type), type_of(stored), shared, threads, {}};
    PlaneReader reader;
    for (const nb::handle entry : planes)
        work.planes.push_back(reader.read(nb::cast<nb::tuple>(entry)));
    nb::gil_scoped_release release;
    decode_planes(work);
}

// The planes of a chunk and what they became, which views of bodies keep alive.
class PlaneEncoder {
public:
    PlaneEncoder(const std::string& type, const nb::sequence& planes, bool per_head,
                 unsigned low_bits, const Tables* shared,
                 const std::optional<Array<const int16_t, nb::ndim<3>>>& costs,
                 const std::optional<Vector<const double>>& bits_saved, size_t threads) {
        require(threads >= 1 && low_bits <= 3, "threads");
        require((shared != nullptr) == costs.has_value() && (!shared) == bits_saved.has_value(),
                "tables");
        PlaneEncode work{{}, per_head, low_bits, shared, {}, {}, threads};
        if (shared) {
            require(costs->shape(0) == 16 && costs->shape(1) == shared->count() &&
                        costs->shape(1) <= 128 && costs->shape(2) == 2 && shared->alphabet() == 32,
                    "costs");
            work.costs = {costs->data(), costs->size()};
        } else {
            require(low_bits == 0 && bits_saved->size() == kTotal + 1, "bits");
            work.bits_saved = {bits_saved->data(), bits_saved->size()};
        }
        for (const nb::handle entry : planes) {
            const auto fields = nb::cast<nb::tuple>(entry);
            PlaneToEncode plane{};
            plane.values.data = reinterpret_cast<const std::byte*>(nb::cast<uintptr_t>(fields[0]));
            plane.values.type = type_of(type);
            int64_t* const sizes[] = {&plane.values.token_stride, &plane.values.head_stride,
                                      &plane.values.tokens, &plane.values.heads, &plane.values.dim};
            for (size_t i = 0; i < std::size(sizes); ++i) *sizes[i] = nb::cast<int64_t>(fields[1 + i]);
            plane.levels = nb::cast<unsigned>(fields[6]);
            require(plane.levels >= 1 && plane.levels <= 127, "levels");
            // Without their low bits symbols have 32 values.
            require(!low_bits || 2 * plane.levels >> low_bits < kMaxAlphabet, "low bits");
            const int64_t channels = plane.values.heads * plane.values.dim;
            require(plane.values.tokens >= 0 && plane.values.heads >= 0 && plane.values.dim >= 0 &&
                        channels <= 0xffff &&
                        (channels == 0 || plane.values.tokens <= (int64_t{1} << 40) / channels),
                    "plane");
            plane.scales = reinterpret_cast<std::byte*>(nb::cast<uintptr_t>(fields[7]));
            work.planes.push_back(plane);
        }
        nb::gil_scoped_release release;
        found_ = encode_planes(work);
    }

    PlaneEncoder(const PlaneEncoder&) = delete;

    static nb::tuple encoded(const nb::object& self, size_t index) {
        const EncodedPlane& plane = nb::cast<const PlaneEncoder&>(self).found_.planes.at(index);
        using Body = nb::ndarray<const uint8_t, nb::numpy, nb::ndim<1>>;
        return nb::make_tuple(
            static_cast<int>(plane.kind),
            nb::bytes(reinterpret_cast<const char*>(plane.tables.data()), plane.tables.size()),
            Body(plane.body.data(), {plane.body.size()}, self),
            Body(plane.low.data(), {plane.low.size()}, self));
    }

private:
    EncodedPlanes found_;
};

void count(const Matrix<const uint8_t>& symbols, unsigned shift, const Matrix<uint32_t>& counts) {
    require(counts.shape(0) == symbols.shape(1) && counts.shape(1) >= 1 && shift <= 7, "counts");
    nb::gil_scoped_release release;
    count_symbols({symbols.shape(0), symbols.shape(1), symbols.data()}, shift, counts.shape(1),
                  counts.data());
}

void normalize(const Matrix<const uint32_t>& counts, const Vector<const double>& bits_saved,
               const Matrix<uint16_t>& freqs) {
    require(bits_saved.size() == kTotal + 1, "bits");
    require(freqs.shape(0) == counts.shape(0) && freqs.shape(1) == counts.shape(1) &&
                counts.shape(1) >= 1 && counts.shape(1) <= kMaxAlphabet, "frequencies");
    nb::gil_scoped_release release;
    normalize_counts({counts.data(), counts.size()}, counts.shape(1),
                     {bits_saved.data(), bits_saved.size()}, freqs.data());
}

void fit(const Matrix<const uint32_t>& counts, const Array<const int16_t, nb::ndim<3>>& costs,
         const Vector<uint8_t>& classes, const Vector<uint8_t>& rotations) {
    const size_t channels = counts.shape(0);
    require(counts.shape(1) == 32 && costs.shape(0) == 16 && costs.shape(1) >= 1 &&
                costs.shape(1) <= 128 && costs.shape(2) == 2, "costs");
    require(classes.size() == channels && rotations.size() == channels, "classes");
    nb::gil_scoped_release release;
    fit_classes({counts.data(), counts.size()}, {costs.data(), costs.size()}, costs.shape(1),
                classes.data(), rotations.data());
}

}  // namespace

void bind_planes(nb::module_& m) {
    m.def("count_symbols", count, "symbols"_a.noconvert(), "shift"_a, "counts"_a.noconvert());
    m.def("normalize_counts", normalize, "counts"_a.noconvert(), "bits_saved"_a.noconvert(),
          "freqs"_a.noconvert());
    m.def("fit_classes", fit, "counts"_a.noconvert(), "costs"_a.noconvert(),
          "classes"_a.noconvert(), "rotations"_a.noconvert());
    nb::class_<PlaneEncoder>(m, "PlaneEncoder")
        .def(nb::init<const std::string&, const nb::sequence&, bool, unsigned, const Tables*,
                      const std::optional<Array<const int16_t, nb::ndim<3>>>&,
                      const std::optional<Vector<const double>>&, size_t>(),
             "type"_a, "planes"_a, "per_head"_a, "low_bits"_a, "shared"_a.none(),
             "costs"_a.none().noconvert(), "bits_saved"_a.none().noconvert(), "threads"_a)
        .def("encoded", &PlaneEncoder::encoded, "index"_a);
    m.def("decode_planes", decode, "type"_a, "stored"_a, "shared"_a, "planes"_a, "threads"_a);
}

}  // namespace cachegen
