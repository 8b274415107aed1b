"""Sliding-window perplexity by PyTorch and transformers alone: what `pi_jax.evaluate perplexity` is held to.

    python tests/transformers_perplexity.py --model DIR --data FILE ... --window 512 --stride 256 --max-tokens 4096

Straight from Hugging Face's documentation of perplexity and YaRN's evaluator; nothing of pi_jax is imported. Prints
JSON: token-weighted perplexity, YaRN's mean over windows, the number of tokens and the seconds of each later window.
With `--stream`, LongLoRA's perplexity instead.
"""

import argparse
import json
import math
import time

import torch
import transformers


@torch.no_grad()
def sliding_perplexity(model, documents, window, stride, bos=None) -> dict:
    """`documents`: lists of token ids; `bos`: token before every window, or None."""
    losses, window_means, seconds, cpu_seconds = [], [], [], []
    for document in documents:
        end_before = 0
        for begin in range(0, len(document), stride):
            started, cpu_started = time.perf_counter(), time.process_time()
            end = min(begin + window - (bos is not None), len(document))
            text = document[begin:end] if bos is None else [bos, *document[begin:end]]
            new = end - end_before  # tokens that this window adds; the first token of a row has no prediction
            new = min(new, len(text) - 1)
            ids = torch.tensor([text])
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=new + 1).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, -new:], reduction="none")
            losses.append(loss.double())
            window_means.append(loss.double().mean())
            if new == stride:  # not a document's first window, nor its last
                seconds.append(time.perf_counter() - started)
                cpu_seconds.append(time.process_time() - cpu_started)
            end_before = end
            if end == len(document):
                break
    losses = torch.cat(losses)
    return {
        "tokens": len(losses),
        "perplexity": math.exp(losses.mean()),
        "window_mean_perplexity": math.exp(torch.stack(window_means).mean()),
        "seconds_a_window": seconds,
        "cpu_seconds_a_window": cpu_seconds,
    }


@torch.no_grad()
def stream_perplexity(model, documents, window, stride) -> dict:
    """LongLoRA's, window by window: all of each but its first token is scored, whatever other windows have scored."""
    stream = torch.tensor([token for document in documents for token in document])
    means = []
    for begin in range(0, len(stream) - window, stride)[:-1]:
        ids = stream[None, begin : begin + window]
        means.append(model(input_ids=ids, labels=ids, use_cache=False).loss.double())
    return {"windows": len(means), "window_mean_perplexity": math.exp(torch.stack(means).mean())}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--bos", action="store_true", help="before every window")
    parser.add_argument("--stream", action="store_true", help="every token of every window over the joined documents")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    documents = []
    for path in args.data:
        with open(path, encoding="utf-8", newline="") as file:
            documents.append(tokenizer(file.read(), add_special_tokens=False)["input_ids"][: args.max_tokens])
    bos = tokenizer.bos_token_id if args.bos else None
    if args.stream:
        result = stream_perplexity(model, documents, args.window, args.stride)
    else:
        result = sliding_perplexity(model, documents, args.window, args.stride, bos)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({**result, **versions}))


if __name__ == "__main__":
    main()
