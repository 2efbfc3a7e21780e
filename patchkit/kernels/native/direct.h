// What functions share that torch's dispatcher calls without Python in between, through torch's stable ABI (torch 2.10 or newer).
//
// A direct form has the schema of its op and serves the common case: dense fp32 rows on a CPU. It hands every other call to the op.
// It does not read PATCHKIT_KERNELS: torch has released Python's lock here, and getenv crashes while another thread changes os.environ.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>

namespace direct {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline bool is_dense(const Tensor& tensor, ScalarType dtype) {
    return tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous();
}

inline bool is_vector(const Tensor& tensor, int64_t n) {
    return tensor.dim() == 1 && tensor.size(0) == n && is_dense(tensor, ScalarType::Float);
}

// The text behind a handle, which is given up. A parameter of type std::string is not: torch 2.13 loses the memory of each.
inline std::string taken(StringHandle handle) {
    size_t length = 0;
    const char* text = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    std::string found(text, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return found;
}

// Outputs [..., n] of a linear layer for x [..., k], not written yet.
inline Tensor outputs_for(const Tensor& x, int64_t n) {
    const auto sizes = x.sizes();
    std::array<int64_t, 8> shape{};
    for (size_t i = 0; i < sizes.size(); ++i) shape[i] = sizes[i];
    shape[sizes.size() - 1] = n;
    return torch::stable::new_empty(x, {shape.data(), sizes.size()});
}

// Whether x [..., k] fits into `outputs_for`, and has from 1 to `most` rows.
inline bool has_few_rows(const Tensor& x, int64_t k, int64_t most) {
    return x.dim() >= 1 && x.dim() <= 8 && x.size(-1) == k && x.numel() > 0 && x.numel() <= most * k;
}

template <typename... Args>
Tensor call(const char* op, const Args&... args) {
    std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace direct
