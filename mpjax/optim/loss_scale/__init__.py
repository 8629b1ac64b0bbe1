"""Loss scales: static, dynamic, from statistics, one a group of weights, one a loss."""
