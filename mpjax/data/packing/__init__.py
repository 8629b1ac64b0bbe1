"""Several documents in a row: which go together, and the batches of them."""
