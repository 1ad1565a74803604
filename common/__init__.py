"""What the experiments share: blocks, maskers, losses, metrics, callbacks, commands. Knows no paper and no data set."""
