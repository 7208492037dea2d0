"""The HTTP routes: parse, call, render; no logic of their own."""
