"""What a run keeps and what follows from it: record, ledger, scores, summary, gates, comparisons."""
