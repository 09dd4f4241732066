"""Zero-shot retrieval: embeddings, the FAISS index, re-ranking, metrics with their controls, reports."""
