"""The same answers, sooner: nothing in this folder changes what is computed."""
