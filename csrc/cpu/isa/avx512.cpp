// The AVX-512 instances, but for those of the files that avx512.hpp names, and the table of all.
#include "cpu/isa/avx512.hpp"

#include "cpu/activation.hpp"
#include "cpu/batch_norm.hpp"
#include "cpu/convert.hpp"
#include "cpu/pool.hpp"
#include "cpu/pool_gradient.hpp"
#include "cpu/small_channel.hpp"
#include "cpu/winograd_rows.hpp"

namespace fastconv::cpu {
namespace {

constexpr const Conv2dAlgorithm* kConv2dAlgorithms[] = {
    &SmallChannel<Avx512>::kAlgorithm,
    &kAvx512Depthwise,
    &kAvx512Grouped,
    &kAvx512Direct,
    &kAvx512Winograd2,
    &kAvx512Winograd4,
    &kAvx512Winograd3,
    &kAvx512Winograd5,
    &kAvx512WinogradStrided,
    &WinogradRows<Avx512>::kAlgorithm,
};

}  // namespace

const Kernels kAvx512Kernels = {
    .conv2d = kConv2dAlgorithms,
    .pool_gradient = PoolGradient<Avx512>::kKernel,
    .activation_grad = activation_grad<Avx512>,
    .add_and_activate = add_and_activate<Avx512>,
    .widen = widen<Avx512>,
    .narrow = narrow<Avx512>,
    .transpose_in = transpose_in<Avx512>,
    .transpose_out = transpose_out<Avx512>,
    .transpose_bytes = transpose<Avx512, std::uint8_t, std::uint8_t>,
    .max_pool2d_fprop = max_pool2d_fprop<Avx512>,
    .max_pool2d_bprop = max_pool2d_bprop<Avx512>,
    .avg_pool2d_fprop = avg_pool2d_fprop<Avx512>,
    .avg_pool2d_bprop = avg_pool2d_bprop<Avx512>,
    .batch_norm_moments = batch_norm_moments<Avx512>,
    .batch_norm_fprop = batch_norm_fprop<Avx512>,
    .batch_norm_bprop = batch_norm_bprop<Avx512>,
};

}  // namespace fastconv::cpu
