"""Tables → tables: embeddings or classical features → well and treatment profiles → mechanism-of-action scores. No torch."""
