"""Makes tests/fixtures/checkpoints/gemma-tokenizer.json: byte-pair encoding of the kind that Gemma, and with it
SigLIP 2, has, with a small vocabulary from the texts of the prompt sets.

    python tests/parity/gemma_tokenizer.py
"""

import pathlib

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main():
    sets = sorted((ROOT / "models/prompts").glob("*.toml"))
    lines = [line.strip().strip('",').lower() for file in sets for line in file.read_text().splitlines()]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], show_progress=False)
    tokenizer.train_from_iterator([line for line in lines if line], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A:0 <eos>:0", pair="$A:0 <eos>:0 $B:1 <eos>:1", special_tokens=[("<eos>", 1)])
    file = ROOT / "tests/fixtures/checkpoints/gemma-tokenizer.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file), pretty=False)


if __name__ == "__main__":
    main()
