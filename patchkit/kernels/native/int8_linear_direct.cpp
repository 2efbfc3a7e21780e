// int8_linear as torch's dispatcher calls it without Python: what compiled code and eager steps of few rows go through.

#include "direct.h"
#include "int8_linear.cpp"

namespace {

constexpr int64_t kMostFeatures = 2147483647 / (255 * 128);
constexpr int64_t kMostBytes = 10;  // rows times bytes per activation, as in int8_linear.py

direct::Tensor int8_linear_direct(direct::Tensor x, direct::Tensor weight, direct::Tensor scale, std::optional<direct::Tensor> bias,
                                  StringHandle activation_handle) {
    using direct::ScalarType;
    const std::string activation = direct::taken(activation_handle);
    const int planes = activation == "int8" ? 1 : 2;
    const bool is_matrix = weight.dim() == 2;
    const int64_t n = is_matrix ? weight.size(0) : 0, k = is_matrix ? weight.size(1) : 0;
    const bool served = direct::is_dense(x, ScalarType::Float) && direct::is_dense(weight, ScalarType::Char) &&
                        direct::is_vector(scale, n) && n > 0 && k <= kMostFeatures && direct::has_few_rows(x, k, kMostBytes / planes) &&
                        (!bias.has_value() || direct::is_vector(*bias, n));
    if (!served) return direct::call("patchkit::int8_linear", x, weight, scale, bias, activation);
    direct::Tensor y = direct::outputs_for(x, n);
    const auto* b = bias.has_value() ? static_cast<const float*>(bias->data_ptr()) : nullptr;
    const int failed = patchkit_int8_linear(static_cast<const float*>(x.data_ptr()), static_cast<const int8_t*>(weight.data_ptr()),
                                            static_cast<const float*>(scale.data_ptr()), b, static_cast<float*>(y.data_ptr()),
                                            x.numel() / k, n, k, planes, static_cast<int>(torch::stable::get_num_threads()));
    STD_TORCH_CHECK(!failed, "int8_linear: no memory for the quantised activations");
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(patchkit, CPU, library) { library.impl("int8_linear_direct", TORCH_BOX(&int8_linear_direct)); }

extern "C" int patchkit_int8_linear_direct() { return 0; }
