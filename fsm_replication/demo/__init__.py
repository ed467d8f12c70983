"""The demo: a real change history, replayed through real nodes on real Redis servers."""
