package imagecache

import (
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// maxAnswer is what is read of an answer into memory, in bytes and unpacked: manifests,
// lists and tokens. The layer manifest, which has a manifest in it, may not be larger.
const maxAnswer = manifest.MaxSize

var errTooLarge = fmt.Errorf("the registry answers with more than %d bytes where a manifest, a list or a token belongs", maxAnswer)

// bounded ends answers that go on for ever, and those that unpack to more than they should:
// HTTP clients unpack what a server says is compressed. Blobs have sizes, and are read no
// further.
type bounded struct{ http.RoundTripper }

func (b bounded) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	// Registries send clients elsewhere for their blobs.
	for req.Response != nil {
		req = req.Response.Request
	}
	if !strings.Contains(req.URL.Path, "/blobs/") {
		resp.Body = &boundedBody{resp.Body, maxAnswer}
	}
	return resp, nil
}

type boundedBody struct {
	io.ReadCloser
	left int64
}

func (b *boundedBody) Read(p []byte) (int, error) {
	// One byte more tells an answer that ends there.
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left+1)])
	if b.left -= int64(n); b.left < 0 {
		return 0, errTooLarge
	}
	return n, err
}

// checkConfigSize refuses what a manifest says of its config, before that is read.
func checkConfigSize(size int64) error {
	if size < 0 || size > maxAnswer {
		return fmt.Errorf("its manifest says that its config has %d bytes, where at most %d are read; push it again", size, maxAnswer)
	}
	return nil
}
