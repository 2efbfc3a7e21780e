// gemv as torch's dispatcher calls it without Python: what compiled code and eager steps of few rows go through.

#include "direct.h"
#include "gemv.cpp"

namespace {

constexpr int64_t kMostDirectRows = 16;  // of fp32, as in gemv.py
constexpr int kFloatKind = 0;

direct::Tensor gemv_direct(direct::Tensor x, direct::Tensor weight, std::optional<direct::Tensor> bias) {
    using direct::ScalarType;
    const bool served = weight.dim() == 2 && weight.numel() > 0 && direct::is_dense(x, ScalarType::Float) &&
                        direct::is_dense(weight, ScalarType::Float) && direct::has_few_rows(x, weight.size(1), kMostDirectRows) &&
                        (!bias.has_value() || direct::is_vector(*bias, weight.size(0)));
    if (!served) return direct::call("patchkit::gemv", x, weight, bias);
    const int64_t n = weight.size(0), k = weight.size(1);
    direct::Tensor y = direct::outputs_for(x, n);
    const auto* b = bias.has_value() ? static_cast<const float*>(bias->data_ptr()) : nullptr;
    const int failed = patchkit_gemv(static_cast<const float*>(x.data_ptr()), weight.data_ptr(), b, static_cast<float*>(y.data_ptr()),
                                     x.numel() / k, n, k, kFloatKind, static_cast<int>(torch::stable::get_num_threads()));
    STD_TORCH_CHECK(!failed, "gemv: this processor is not served");
    return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(patchkit, CPU, library) { library.impl("gemv_direct", TORCH_BOX(&gemv_direct)); }

extern "C" int patchkit_gemv_direct() { return 0; }
