"""Text to rows: documents are read, tokenized once into a store, packed into rows and fed to training.

documents.py  text files to documents
prepare.py    documents to a token store (`python -m pi_jax.prepare`)
store.py      the token store: all documents as one array of tokens
packing.py    a span of tokens to one row: inputs, targets, positions, segments, weights
pipeline.py   the batch of any step, and an iterator that prefetches them
"""
