// Planes of `lossless` as Python sees them. Argument checks are here and in native/lossless.py.
#include <nanobind/stl/string.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "lossless.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace cachegen {
namespace {

using Bytes = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>;

Bytes array_of(std::vector<uint8_t>&& bytes) {
    auto* const kept = new std::vector<uint8_t>(std::move(bytes));
    const nb::capsule owner(kept, [](void* p) noexcept {
        delete static_cast<std::vector<uint8_t>*>(p);
    });
    return {kept->data(), {kept->size()}, owner};
}

// Tuples as native/lossless.py makes them; the caller keeps the arrays alive.
nb::list encode(const std::string& type, const nb::sequence& planes,
                const Vector<const int16_t>& costs, const Vector<const double>& bits_saved,
                size_t threads) {
    require(costs.size() == kTotal + 1 && bits_saved.size() == kTotal + 1, "costs");
    require(threads >= 1, "threads");
    std::vector<Plane<const std::byte>> views;
    for (const nb::handle entry : planes) {
        const auto fields = nb::cast<nb::tuple>(entry);
        views.push_back({reinterpret_cast<const std::byte*>(nb::cast<uintptr_t>(fields[0])),
                         type_of(type), nb::cast<uint32_t>(fields[1]), nb::cast<uint32_t>(fields[2]),
                         nb::cast<uint32_t>(fields[3]), nb::cast<int64_t>(fields[4]),
                         nb::cast<int64_t>(fields[5])});
    }
    const LosslessCosts both{{costs.data(), costs.size()}, {bits_saved.data(), bits_saved.size()}};
    std::vector<LosslessPlane> coded;
    {
        nb::gil_scoped_release release;
        coded = encode_lossless(views, both, threads);
    }
    nb::list result;
    for (LosslessPlane& plane : coded)
        result.append(nb::make_tuple(array_of(std::move(plane.side)), array_of(std::move(plane.body))));
    return result;
}

void decode(const std::string& type, const std::string& stored, const nb::sequence& planes,
            size_t threads) {
    require(threads >= 1, "threads");
    LosslessDecode work{type_of(type), type_of(stored), threads, {}};
    std::vector<nb::object> kept;
    const auto view = [&]<class T>(nb::handle array, T) -> std::span<const T> {
        const auto typed = nb::cast<Vector<const T>>(array, /* convert = */ false);
        kept.push_back(nb::borrow(array));
        return {typed.data(), typed.size()};
    };
    for (const nb::handle entry : planes) {
        const auto fields = nb::cast<nb::tuple>(entry);
        const auto to = nb::cast<nb::tuple>(fields[3]);
        const auto offsets = view(to[1], int64_t{});
        LosslessSource plane{nb::cast<uint64_t>(fields[0]), view(fields[1], uint8_t{}),
                             view(fields[2], uint8_t{}), {}};
        require(offsets.size() == plane.tokens, "offsets");
        plane.target = {reinterpret_cast<std::byte*>(nb::cast<uintptr_t>(to[0])),
                        offsets.data(), nb::cast<int64_t>(to[2]), nb::cast<uint32_t>(to[3]),
                        nb::cast<uint32_t>(to[4]), -1, 0, nb::cast<bool>(to[7])};
        work.planes.push_back(plane);
    }
    nb::gil_scoped_release release;
    decode_lossless(work);
}

}  // namespace

void bind_lossless(nb::module_& m) {
    m.def("encode_lossless", encode, "type"_a, "planes"_a, "costs"_a.noconvert(),
          "bits_saved"_a.noconvert(), "threads"_a);
    m.def("decode_lossless", decode, "type"_a, "stored"_a, "planes"_a, "threads"_a);
}

}  // namespace cachegen
