"""Recurrent language models: LSTM and GRU."""
