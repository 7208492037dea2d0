"""The commands of `coxswain` but `serve`, which is `server.launch`. `server.main` names them."""
