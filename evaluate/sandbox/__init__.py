"""Where judged programs run: worker processes, isolation, and the wire between program and checker."""
