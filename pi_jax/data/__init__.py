"""Data: text is read, tokenized once into a token store, packed into sequences and fed to training.

find.py       finds the text files in folders and globs
documents.py  reads documents from text files
tokenizer.py  loads tokenizers and encodes text
chat.py       renders prompts with a model's chat template
prepare.py    writes documents to a token store (`python -m pi_jax.prepare`)
manifest.py   checks the manifest of a token store
store.py      the token store: all documents as one array of tokens
packing.py    makes a sequence from a span of tokens: inputs, targets, positions, segments, weights
pipeline.py   the batch of any step, and an iterator that prefetches batches
"""
