"""The front end `"export"`: from `torch.export` to a graph of dispatcher operators for both modes."""
