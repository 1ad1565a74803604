"""Brain MRI from many sources under canonical sequence names."""
