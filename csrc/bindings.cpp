// The only file that sees Python. Each function checks that its arrays fit one another (they
// already have the right type and layout, or nanobind would not have called), releases the GIL and
// calls the core. The typed face for callers is src/cachegen/native/__init__.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings.h"
#include "dispatch.h"
#include "quantize.h"
#include "rans.h"
#include "segment_layout.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace cachegen {
namespace {

// Elements of 2 or 4 bytes as bits: NumPy cannot export bfloat16, so all types travel so.
template <class Bits>
using StridedPlane = nb::ndarray<Bits, nb::device::cpu, nb::ndim<3>>;

template <class T>
std::span<const T> view(const Array<const T>& array) {
    return {array.data(), array.size()};
}

std::span<const uint8_t> view(const std::optional<Vector<const uint8_t>>& array) {
    return array ? std::span(array->data(), array->size()) : std::span<const uint8_t>();
}

Coding make_coding(uint64_t tokens, uint64_t channels, const Tables& tables,
                   const Array<const uint16_t>& models,
                   const std::optional<Vector<const uint8_t>>& shifts,
                   const std::optional<Matrix<const uint8_t>>& contexts) {
    require(channels == 0 || tokens <= Shape::kMaxSymbols / channels, "symbol matrix");
    const Shape shape{tokens, channels};
    const bool per_place = models.ndim() == 2;
    require(models.size() == (per_place ? shape.steps() : channels), "models");
    require(!shifts || shifts->size() == channels, "shifts");
    require(!contexts || (contexts->shape(0) == tokens && contexts->shape(1) == channels),
            "contexts");
    return {shape, tables, view(models), per_place, view(shifts),
            contexts ? contexts->data() : nullptr};
}

nb::bytes encode(const Matrix<const uint8_t>& symbols, const Array<const uint16_t>& models,
                 const Tables& tables, const std::optional<Vector<const uint8_t>>& shifts,
                 const std::optional<Matrix<const uint8_t>>& contexts, uint64_t stream_steps) {
    const Coding coding =
        make_coding(symbols.shape(0), symbols.shape(1), tables, models, shifts, contexts);
    require(stream_steps >= 1 && stream_steps <= kMaxStreamSteps, "stream_steps");
    std::vector<uint8_t> body;
    {
        nb::gil_scoped_release release;
        body = encode_segment(symbols.data(), coding, stream_steps);
    }
    return nb::bytes(body.data(), body.size());
}

void decode(const Vector<const uint8_t>& body, const Array<const uint16_t>& models,
            const Tables& tables, const std::optional<Vector<const uint8_t>>& shifts,
            const std::optional<Matrix<const uint8_t>>& contexts, uint64_t first, uint64_t count,
            const Matrix<uint8_t>& out) {
    const Coding coding =
        make_coding(out.shape(0), out.shape(1), tables, models, shifts, contexts);
    nb::gil_scoped_release release;
    decode_segment({body.data(), body.size()}, coding, first, count, out.data());
}

void verify(const Vector<const uint8_t>& body, uint64_t tokens, uint64_t channels,
            const Array<const uint16_t>& models, const Tables& tables) {
    const Coding coding = make_coding(tokens, channels, tables, models, {}, {});
    nb::gil_scoped_release release;
    decode_segment({body.data(), body.size()}, coding, 0, ~uint64_t{0}, nullptr);
}

nb::list layout(const Vector<const uint8_t>& body, uint64_t tokens, uint64_t channels,
                const std::optional<Vector<const uint8_t>>& shifts) {
    require(channels == 0 || tokens <= Shape::kMaxSymbols / channels, "symbol matrix");
    require(!shifts || shifts->size() == channels, "shifts");
    nb::list streams;
    for (const StreamLayout& s :
         parse_layout({body.data(), body.size()}, {tokens, channels}, view(shifts)))
        streams.append(nb::make_tuple(s.offset, s.size(), s.states, s.raw, s.words, s.escapes,
                                      s.padding));
    return streams;
}

template <class Byte, class Bits>
Plane<Byte> make_plane(const StridedPlane<Bits>& values, const std::string& type) {
    KVType kind = KVType::Float32;
    if (type == "float16")
        kind = KVType::Float16;
    else if (type == "bfloat16")
        kind = KVType::BFloat16;
    require(type == "float32" ? sizeof(Bits) == 4 : sizeof(Bits) == 2, "element type");
    // An array without elements may have any strides.
    require(values.size() == 0 || values.shape(2) <= 1 || values.stride(2) == 1,
            "stride of the head dimension");
    const auto size = [&](size_t axis) { return static_cast<int64_t>(values.shape(axis)); };
    const auto stride = [&](size_t axis) {
        return values.stride(axis) * static_cast<int64_t>(sizeof(Bits));
    };
    auto* const data = reinterpret_cast<Byte*>(values.data());
    return {data, kind, size(0), size(1), size(2), stride(0), stride(1)};
}

// Returns whether every head has a scale of its own.
template <class Byte, class Symbols, class Scales>
bool check_plane(const Plane<Byte>& plane, uint64_t levels, const Symbols& symbols,
                 const Scales& scales) {
    const auto tokens = static_cast<size_t>(plane.tokens), heads = static_cast<size_t>(plane.heads);
    require(levels >= 1 && levels <= 127, "levels");
    require(symbols.shape(0) == tokens &&
                symbols.shape(1) == heads * static_cast<size_t>(plane.dim), "symbols");
    const bool per_head = scales.shape(1) == heads;
    require(scales.shape(0) == tokens && (per_head || scales.shape(1) == 1), "scales");
    return per_head;
}

template <class Bits>
void quantize_bits(const StridedPlane<const Bits>& values, const std::string& type,
                   uint64_t levels, const Matrix<uint8_t>& symbols, const Matrix<Bits>& scales) {
    const auto plane = make_plane<const std::byte>(values, type);
    const bool per_head = check_plane(plane, levels, symbols, scales);
    nb::gil_scoped_release release;
    quantize(plane, static_cast<unsigned>(levels), per_head, symbols.data(),
             reinterpret_cast<std::byte*>(scales.data()));
}

template <class Bits>
void dequantize_bits(const Matrix<const uint8_t>& symbols, const Matrix<const Bits>& scales,
                     uint64_t levels, const StridedPlane<Bits>& out, const std::string& type) {
    const auto plane = make_plane<std::byte>(out, type);
    const bool per_head = check_plane(plane, levels, symbols, scales);
    nb::gil_scoped_release release;
    dequantize(symbols.data(), reinterpret_cast<const std::byte*>(scales.data()), per_head,
               static_cast<unsigned>(levels), plane);
}

const char* python_name(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::Config: return "ConfigError";
        case ErrorKind::Geometry: return "GeometryError";
        case ErrorKind::NonFinite: return "NonFiniteError";
        case ErrorKind::Truncated: return "TruncatedError";
        case ErrorKind::Corrupt: return "CorruptError";
    }
    return "CacheGenError";
}

void translate(const std::exception_ptr& pending, void*) {
    try {
        std::rethrow_exception(pending);
    } catch (const Error& error) {
        const nb::object errors = nb::module_::import_("cachegen.errors");
        const nb::object type = errors.attr(python_name(error.kind));
        const auto text = [](const std::string& s) -> nb::object {
            return s.empty() ? nb::none() : nb::object(nb::str(s.c_str(), s.size()));
        };
        const nb::object value =
            type(error.subject, "got"_a = text(error.got), "expected"_a = text(error.expected),
                 "remedy"_a = text(error.remedy));
        PyErr_SetObject(type.ptr(), value.ptr());
    }
}

}  // namespace

NB_MODULE(_core, m) {
    // Cached table sets live until the interpreter ends; that is no leak worth a message.
    nb::set_leak_warnings(false);
    nb::register_exception_translator(translate);

    nb::class_<Tables>(m, "Tables")
        .def(
            "__init__",
            [](Tables* self, const Matrix<const uint16_t>& freqs,
               const std::optional<Vector<const uint8_t>>& escapes) {
                require(!escapes || escapes->size() == freqs.shape(0), "escapes");
                new (self) Tables({freqs.data(), freqs.size()}, view(escapes), freqs.shape(0),
                                  freqs.shape(1));
            },
            "freqs"_a.noconvert(), "escapes"_a.none().noconvert());

    m.def("encode_segment", encode, "symbols"_a.noconvert(), "models"_a.noconvert(), "tables"_a,
          "shifts"_a.none().noconvert(), "contexts"_a.none().noconvert(), "stream_steps"_a);
    m.def("decode_segment", decode, "body"_a.noconvert(), "models"_a.noconvert(), "tables"_a,
          "shifts"_a.none().noconvert(), "contexts"_a.none().noconvert(), "first"_a, "count"_a,
          "out"_a.noconvert());
    m.def("verify_segment", verify, "body"_a.noconvert(), "tokens"_a, "channels"_a,
          "models"_a.noconvert(), "tables"_a);
    m.def("segment_layout", layout, "body"_a.noconvert(), "tokens"_a, "channels"_a,
          "shifts"_a.none().noconvert());

    m.def("quantize", quantize_bits<uint16_t>, "values"_a.noconvert(), "type"_a, "levels"_a,
          "symbols"_a.noconvert(), "scales"_a.noconvert());
    m.def("quantize", quantize_bits<uint32_t>, "values"_a.noconvert(), "type"_a, "levels"_a,
          "symbols"_a.noconvert(), "scales"_a.noconvert());
    m.def("dequantize", dequantize_bits<uint16_t>, "symbols"_a.noconvert(), "scales"_a.noconvert(),
          "levels"_a, "out"_a.noconvert(), "type"_a);
    m.def("dequantize", dequantize_bits<uint32_t>, "symbols"_a.noconvert(), "scales"_a.noconvert(),
          "levels"_a, "out"_a.noconvert(), "type"_a);

    bind_fused(m);
    bind_encode(m);
    bind_lossless(m);
    bind_planes(m);
    bind_profile(m);
    bind_sparse(m);

    m.def("isa", [] { return kernels().isa; });
    m.def("select_isa", select_isa, "isa"_a);
    m.def("available_isas", [] {
        std::vector<std::string_view> names;
        for (const Kernels* backend : backends())
            if (backend->is_available()) names.push_back(backend->isa);
        return names;
    });
}

}  // namespace cachegen
