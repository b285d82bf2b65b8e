//! TODO-ROOM

pub(crate) mod bf16_weights;
pub(crate) mod cpu_shards;
pub(crate) mod fused_ops;
pub(crate) mod skinny_matmul;
