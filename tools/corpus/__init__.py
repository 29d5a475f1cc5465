"""The guts of `preprocess`: inputs, plan, shards, ledger, workers, and the datasets they end in."""
