//! Weights drawn from a generator that is seeded by the name of the tensor, as `tests/parity/matrix.py`
//! draws them.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;

/// Returns the values of a tensor.
fn draw(name: &str, shape: &[usize]) -> Vec<f32> {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |seed, byte| {
        (seed ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let contains = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
    let small = contains(&["embed", "probe", "latent"]) && !name.contains("patch");
    let fan_in = shape.iter().skip(1).product::<usize>() as f64;
    let value = |noise: f64| {
        if name.ends_with("logit_scale") {
            2.3
        } else if name.ends_with("logit_bias") {
            -12.9
        } else if name.ends_with("weight") && contains(&["norm", "ln_"]) {
            1.0 + 0.2 * noise
        } else if shape.len() < 2 || small {
            0.3 * noise
        } else {
            (3.0 / fan_in).sqrt() * noise
        }
    };
    (1..=shape.iter().product::<usize>() as u64)
        .map(|number| {
            let x = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let x = x ^ (x >> 31);
            value((x >> 11) as f64 * 2f64.powi(-52) - 1.0) as f32
        })
        .collect()
}

/// Returns the type of that name in PyTorch.
fn dtype_of(name: &str) -> Dtype {
    match name {
        "float32" => Dtype::F32,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float64" => Dtype::F64,
        "int8" => Dtype::I8,
        "uint8" => Dtype::U8,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        other => panic!("{other}"),
    }
}

fn to_bytes(values: &[f64], dtype: Dtype) -> Vec<u8> {
    let bytes = |value: &f64| match dtype {
        Dtype::F64 => value.to_le_bytes().to_vec(),
        Dtype::F32 => (*value as f32).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(*value as f32).to_le_bytes().to_vec(),
        Dtype::BF16 => half::bf16::from_f32(*value as f32).to_le_bytes().to_vec(),
        // Only zeros are written in types of one byte.
        _ => vec![0],
    };
    values.iter().flat_map(bytes).collect()
}

/// Writes the file that `spec` describes; `sets` has the shapes of tensors by name.
pub fn write_weights(file: &Path, sets: &Value, spec: &Value) {
    let mut shapes: BTreeMap<String, Vec<usize>> =
        serde_json::from_value(sets[spec["set"].as_str().unwrap()].clone()).unwrap();
    for (name, shape) in spec["add"].as_object().into_iter().flatten() {
        shapes.insert(name.clone(), serde_json::from_value(shape.clone()).unwrap());
    }
    let dropped: Vec<String> = serde_json::from_value(spec["drop"].clone()).unwrap_or_default();
    let (part, parts): (usize, usize) =
        serde_json::from_value(spec["part"].clone()).unwrap_or((0, 1));
    let dtype = dtype_of(spec["dtype"].as_str().unwrap_or("float32"));
    let prefix = spec["prefix"].as_str().unwrap_or_default();
    let kept = shapes.iter().filter(|(name, _)| !dropped.contains(name));
    let tensors: Vec<_> = kept
        .enumerate()
        .filter(|(number, _)| number % parts == part)
        .map(|(_, (name, shape))| {
            let mut values: Vec<f64> = draw(name, shape).into_iter().map(f64::from).collect();
            if let Some(first) = spec["values"][name].as_str() {
                values[0] = first.parse().unwrap();
            }
            let dtype = spec["types"][name].as_str().map_or(dtype, dtype_of);
            (format!("{prefix}{name}"), shape.clone(), dtype, to_bytes(&values, dtype))
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, dtype, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    let mut bytes = safetensors::serialize(views, None).unwrap();
    if let Some(kept) = spec["keep"].as_f64() {
        bytes.truncate((bytes.len() as f64 * kept) as usize);
    }
    std::fs::write(file, bytes).unwrap();
}
