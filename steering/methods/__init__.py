"""The built-in steering methods, one small file each; found like any plugin's."""
