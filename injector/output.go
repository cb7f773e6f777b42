package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/selkies-project/packer-plugin-selkies/version"
)

// print writes v as JSON, or calls text, as --output asks.
func (f *flags) print(w io.Writer, v any, text func(io.Writer)) error {
	if f.output == outputText {
		text(w)
		return nil
	}
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

func table(w io.Writer) *tabwriter.Writer {
	return tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
}

func newVersionCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "The injector's version",
		Args:  usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := struct {
				Version string `json:"version"`
			}{version.String()}
			return f.print(cmd.OutOrStdout(), v, func(w io.Writer) { fmt.Fprintln(w, v.Version) })
		},
	}
}
