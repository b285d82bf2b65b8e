//! CPU kernels of the encoders: matrix products for few rows and with bfloat16 weights, element-wise
//! operations fused into one pass, and the distribution of a batch over the cores. On a GPU only
//! candle's own operations run.

pub(crate) mod bf16_weights;
pub(crate) mod cpu_shards;
pub(crate) mod fused_ops;
pub(crate) mod skinny_matmul;
