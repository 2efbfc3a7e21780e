// int4_linear as torch's dispatcher calls it without Python: what compiled code and eager steps go through.

#include "direct.h"
#include "int4_linear.cpp"

namespace {

constexpr int64_t kMostPlainRows = 2;  // as in int4_linear.py, for processors without vector instructions
constexpr int64_t kAnyRows = 1 << 30;

direct::Tensor int4_linear_direct(direct::Tensor x, direct::Tensor weight, direct::Tensor unit, std::optional<direct::Tensor> bias,
                                  int64_t group, StringHandle activation_handle) {
    using direct::ScalarType;
    const std::string activation = direct::taken(activation_handle);
    const int64_t n = unit.dim() == 1 ? unit.size(0) : 0, k = x.dim() ? x.size(-1) : 0;
    const int64_t per_output = group / 2, symmetric = kOutputs * (2 + per_output), asymmetric = kOutputs * (4 + per_output);
    const bool served = n > 0 && k > 0 && (group == 32 || group == 128) && direct::is_dense(x, ScalarType::Float) &&
                        direct::has_few_rows(x, k, kLevel == kPlain ? kMostPlainRows : kAnyRows) && direct::is_vector(unit, n) &&
                        direct::is_dense(weight, ScalarType::Byte) && weight.dim() == 3 &&
                        weight.size(0) == (n + kOutputs - 1) / kOutputs && weight.size(1) == (k + group - 1) / group &&
                        (weight.size(2) == symmetric || weight.size(2) == asymmetric) &&
                        (!bias.has_value() || direct::is_vector(*bias, n));
    if (!served) return direct::call("patchkit::int4_linear", x, weight, unit, bias, group, activation);
    direct::Tensor y = direct::outputs_for(x, n);
    const auto* b = bias.has_value() ? static_cast<const float*>(bias->data_ptr()) : nullptr;
    const int failed =
        patchkit_int4_linear(static_cast<const float*>(x.data_ptr()), static_cast<const uint8_t*>(weight.data_ptr()),
                             static_cast<const float*>(unit.data_ptr()), b, static_cast<float*>(y.data_ptr()), x.numel() / k, n, k,
                             static_cast<int>(group), weight.size(2) == symmetric, activation == "int8" ? 1 : 2,
                             static_cast<int>(torch::stable::get_num_threads()));
    STD_TORCH_CHECK(!failed, "int4_linear: no memory for the quantised activations");
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(patchkit, CPU, library) { library.impl("int4_linear_direct", TORCH_BOX(&int4_linear_direct)); }

extern "C" int patchkit_int4_linear_direct() { return 0; }
