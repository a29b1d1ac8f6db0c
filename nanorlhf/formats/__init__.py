"""Other people's file formats. A reader of the algorithms may skip this folder."""
