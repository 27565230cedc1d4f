"""The recorder of an ordinary window. In: operators on real tensors. Out: entries. Imports: `ir`, `capture`."""
