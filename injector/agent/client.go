package agent

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// scheme has the core API alone. client-go's clientset has all of Kubernetes, and the
// program, which every node pulls, would be larger by half.
var scheme = runtime.NewScheme()

func init() {
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	if err := corev1.AddToScheme(scheme); err != nil {
		panic(err) // of types alone
	}
}

// client speaks to the API server.
type client struct{ *rest.RESTClient }

func newClient(kubeconfig string) (client, error) {
	config, err := clientConfig(kubeconfig)
	if err != nil {
		return client{}, err
	}
	config.UserAgent = component
	config.APIPath = "/api"
	config.GroupVersion = &corev1.SchemeGroupVersion
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	rc, err := rest.RESTClientFor(config)
	if err != nil {
		return client{}, fmt.Errorf("making a client of the API server at %s: %w", config.Host, err)
	}
	return client{rc}, nil
}

func clientConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig != "" {
		config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
		if err != nil {
			return nil, fmt.Errorf("reading --kubeconfig %s: %w", kubeconfig, err)
		}
		return config, nil
	}
	config, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("not in a pod with a service account (%w): give --kubeconfig, or --kubernetes=false without a cluster", err)
	}
	return config, nil
}

// requestTime bounds one request to the API server.
const requestTime = 30 * time.Second

func (c client) patchNode(ctx context.Context, name string, typ types.PatchType, patch []byte, subresources ...string) (*corev1.Node, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	node := &corev1.Node{}
	err := c.Patch(typ).Resource("nodes").Name(name).SubResource(subresources...).
		VersionedParams(&metav1.PatchOptions{FieldManager: component}, metav1.ParameterCodec).
		Body(patch).Do(ctx).Into(node)
	return node, err
}

func (c client) listPods(ctx context.Context, options metav1.ListOptions) ([]corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTime)
	defer cancel()
	pods := &corev1.PodList{}
	err := c.Get().Resource("pods").VersionedParams(&options, metav1.ParameterCodec).Do(ctx).Into(pods)
	return pods.Items, err
}

// eventSink implements record.EventSink.
type eventSink struct{ client }

func (s eventSink) send(r *rest.Request, e *corev1.Event) (*corev1.Event, error) {
	ctx, cancel := context.WithTimeout(context.Background(), requestTime)
	defer cancel()
	sent := &corev1.Event{}
	err := r.Namespace(e.Namespace).Resource("events").Do(ctx).Into(sent)
	return sent, err
}

// Create sends a new event.
func (s eventSink) Create(e *corev1.Event) (*corev1.Event, error) {
	return s.send(s.Post().Body(e), e)
}

// Update replaces an event.
func (s eventSink) Update(e *corev1.Event) (*corev1.Event, error) {
	return s.send(s.Put().Name(e.Name).Body(e), e)
}

// Patch counts an event again.
func (s eventSink) Patch(e *corev1.Event, data []byte) (*corev1.Event, error) {
	return s.send(s.client.Patch(types.StrategicMergePatchType).Name(e.Name).Body(data), e)
}
