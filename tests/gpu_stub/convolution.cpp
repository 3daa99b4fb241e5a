// Convolutions without cuDNN: outputs of the right shape, type and memory format, and no values.
#include "counters.h"
#include <ATen/ATen.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/native/utils/ParamUtils.h>
#include <torch/library.h>

using namespace at;

namespace {

void count_convolution() {
    stub_count(CONVOLUTION, 1);
    stub_count(LAUNCH, 1);
}

std::vector<int64_t> output_size(
    IntArrayRef input, IntArrayRef weight, IntArrayRef padding, IntArrayRef stride, IntArrayRef dilation) {
    std::vector<int64_t> sizes{input[0], weight[0]};
    for (size_t d = 2; d < input.size(); ++d) {
        int64_t kernel = dilation[d - 2] * (weight[d] - 1) + 1;
        sizes.push_back((input[d] + 2 * padding[d - 2] - kernel) / stride[d - 2] + 1);
    }
    return sizes;
}

Tensor forward(
    const Tensor &input, const Tensor &weight, SymIntArrayRef padding, SymIntArrayRef stride, SymIntArrayRef dilation,
    SymInt groups, bool benchmark, bool deterministic, bool allow_tf32) {
    TORCH_CHECK(
        input.scalar_type() == weight.scalar_type(), "convolution of ", input.scalar_type(), " with weights of ",
        weight.scalar_type());
    auto format = native::cudnn_conv_suggest_memory_format(input, weight);
    auto contiguous_input = input.contiguous(format), contiguous_weight = weight.contiguous(format);
    count_convolution();
    auto sizes = output_size(
        input.sizes(), weight.sizes(), C10_AS_INTARRAYREF_SLOW(padding), C10_AS_INTARRAYREF_SLOW(stride),
        C10_AS_INTARRAYREF_SLOW(dilation));
    return at::empty(sizes, input.options().memory_format(format));
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor &gradient, const Tensor &input, const Tensor &weight, OptionalSymIntArrayRef bias, SymIntArrayRef stride,
    SymIntArrayRef padding, SymIntArrayRef dilation, bool transposed, SymIntArrayRef output_padding, SymInt groups,
    std::array<bool, 3> mask) {
    auto format = native::cudnn_conv_suggest_memory_format(input, weight);
    auto contiguous_gradient = gradient.contiguous(format), contiguous_input = input.contiguous(format);
    Tensor input_gradient, weight_gradient, bias_gradient;
    if (mask[0]) {
        count_convolution();
        input_gradient = at::empty(input.sizes(), input.options().memory_format(format));
    }
    if (mask[1]) {
        count_convolution();
        weight_gradient = at::empty(weight.sizes(), weight.options().memory_format(format));
    }
    if (mask[2]) bias_gradient = contiguous_gradient.sum(IntArrayRef{0, 2, 3});
    return {input_gradient, weight_gradient, bias_gradient};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
    library.impl("cudnn_convolution", forward);
    library.impl("convolution_backward", backward);
}
