"""The demo zoo: a family of small language models trained from nothing on an invented world."""
