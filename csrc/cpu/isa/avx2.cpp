// The AVX2 + FMA instances, but for those of the files that avx2.hpp names, and the table of all.
#include "cpu/isa/avx2.hpp"

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
    &SmallChannel<Avx2>::kAlgorithm,
    &kAvx2Depthwise,
    &kAvx2Grouped,
    &kAvx2Direct,
    &kAvx2Winograd2,
    &kAvx2Winograd4,
    &kAvx2Winograd3,
    &kAvx2Winograd5,
    &kAvx2WinogradStrided,
    &WinogradRows<Avx2>::kAlgorithm,
};

}  // namespace

const Kernels kAvx2Kernels = {
    .conv2d = kConv2dAlgorithms,
    .pool_gradient = PoolGradient<Avx2>::kKernel,
    .activation_grad = activation_grad<Avx2>,
    .add_and_activate = add_and_activate<Avx2>,
    .widen = widen<Avx2>,
    .narrow = narrow<Avx2>,
    .transpose_in = transpose_in<Avx2>,
    .transpose_out = transpose_out<Avx2>,
    .transpose_bytes = transpose<Avx2, std::uint8_t, std::uint8_t>,
    .max_pool2d_fprop = max_pool2d_fprop<Avx2>,
    .max_pool2d_bprop = max_pool2d_bprop<Avx2>,
    .avg_pool2d_fprop = avg_pool2d_fprop<Avx2>,
    .avg_pool2d_bprop = avg_pool2d_bprop<Avx2>,
    .batch_norm_moments = batch_norm_moments<Avx2>,
    .batch_norm_fprop = batch_norm_fprop<Avx2>,
    .batch_norm_bprop = batch_norm_bprop<Avx2>,
};

}  // namespace fastconv::cpu
